"""``tpt-fast methods``: what can be done with the views of an image."""

from __future__ import annotations

from dataclasses import MISSING
from typing import Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from . import _shared


def methods(
    name: Annotated[str | None, typer.Argument(metavar="NAME", help="Show this one's options.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a line for each method.")] = False,
) -> None:
    """Show the methods of `tpt-fast tune --method`: what each is, its paper, what it tunes, its options."""
    with _shared.environment():
        from ..methods import METHODS, method_class

        with _shared.usage("NAME"):
            chosen = METHODS if name is None else [name]
            found = [_describe(method_class(each)) for each in chosen]
    if as_json:
        for each in found:
            _shared.json_line(each)
    elif name is None:
        _shared.out.print(_table(found))
    else:
        _shared.out.print(_table(found), _options(found[0]))


def _describe(of: Any) -> dict[str, Any]:
    from ..methods import method_options

    options = {
        name: {
            "default": None if field.default is MISSING else field.default,
            "meaning": field.metadata["help"],
        }
        for name, field in method_options(of).items()
    }
    meaning = " ".join(of.__doc__.split("\n\n")[0].split())
    told = {"name": of.name, "meaning": meaning, "paper": of.paper, "tunes": of.tunes, "gradient": of.gradient}
    return {**told, "online": of.online is True, "options": options}


def _table(found: list[dict[str, Any]]) -> Table:
    table = Table("method", "what it is", "paper", "tunes", "gradient", "options")
    table.columns[0].no_wrap = True
    for column in table.columns:
        column.overflow = "fold"
    for each in found:
        cells = (each["meaning"], each["paper"], each["tunes"], each["gradient"], ", ".join(each["options"]))
        table.add_row(Text(each["name"], "bold"), *map(Text, cells))
    return table


def _options(method: dict[str, Any]) -> Table:
    table = Table("option", "default", "what it means")
    table.columns[0].no_wrap = True
    for name, option in method["options"].items():
        table.add_row(Text(name, "bold"), Text(str(option["default"])), Text(option["meaning"]))
    return table
