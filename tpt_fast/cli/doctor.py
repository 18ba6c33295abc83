"""``tpt-fast doctor``: what was found, and what to do about what is missing."""

from __future__ import annotations

import time
from typing import Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from .. import doctor as _doctor
from . import _models, _shared

_SHOWN = 4  #: builds, the newest: two halves, before and after a change


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
    build: Annotated[bool, typer.Option("--build", help="Compile the kernels again, now.")] = False,
    model: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help="Say how the towers of this model (as for tune) run. Default: the demo model."
        ),
    ] = None,
) -> None:
    """Show what was found here and what to do about what is missing.

    Loads the kernels, compiling them if there is no build yet. Exit codes: 0 they work, 3 they do not.
    """
    _shared.check_stdout()
    with _shared.compiling() as progress:
        report = _doctor.examine(progress, rebuild=build)
    if report.works:
        loaded = _models.load(model, _models.RANDOM, "cpu")
        report.found[model or "demo model"] = _doctor.towers(loaded.model, loaded.tokenizer)
    if as_json:
        _shared.json_line({"works": report.works, "found": report.found, "advice": report.advice})
    else:
        _shared.print_table(_table(report))
        verdict = ("the compiled kernels work", "green") if report.works else ("the compiled kernels do not run", "red")
        _shared.print_lines(Text(*verdict), *(Text(f"• {_shared.shown_lines(advice)}") for advice in report.advice))
    if not report.works:
        raise typer.Exit(_shared.ENVIRONMENT)


def _table(report: _doctor.Report) -> Table:
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in report.found.items():
        table.add_row(name, Text(_shared.shown_lines(_describe(value))))
    return table


def _describe(value: Any) -> str:
    if value is None or value == []:
        return "none"
    if isinstance(value, dict):
        builds = value.get("builds") or []
        lines = [f"{key}: {_describe(item)}" for key, item in value.items() if key != "builds" and item is not None]
        older = [f"and {len(builds) - _SHOWN} older ones"] if len(builds) > _SHOWN else []
        return "\n".join([*lines, *map(_build, builds[-_SHOWN:]), *older])
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _build(build: dict[str, Any]) -> str:
    when = time.strftime("%Y-%m-%d %H:%M", time.localtime(build["time"]))
    kind = {"cpu": "CPU", "cuda": "CUDA"}[build["half"]]
    took = f" in {build['seconds']} s" if build["seconds"] else ""
    problem = f"; {build['problem']}" if build["problem"] else ""
    return f"{build['key']}: {kind}, {build['bytes'] / 1e6:.1f} MB, built {when}{took}{problem}"
