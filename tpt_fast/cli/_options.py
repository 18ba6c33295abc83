"""Options of a command from the fields of a dataclass: names, defaults and help stand there, once."""

from __future__ import annotations

import ast
import functools
import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any, TypeAlias

import typer
from rich.markup import escape

from ..config import TuneConfig

MODEL, TUNING = "Model", "Tuning (defaults: the paper's)"  #: headings of ``--help``


def names_file(help: str) -> Any:
    """The option of a file of class names, which is there."""
    return typer.Option(metavar="FILE", exists=True, dir_okay=False, readable=True, help=help)


# --- options that several commands have; each is named by its parameter

ModelName: TypeAlias = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="An open_clip model, or hf:NAME of one of transformers. Default: the small demo model.",
        rich_help_panel=MODEL,
    ),
]
Pretrained: TypeAlias = Annotated[
    str | None,
    typer.Option(
        metavar="TAG|PATH|none",
        help="Weights of --model: open_clip's tag, a file, or none for random ones.",
        rich_help_panel=MODEL,
    ),
]
Device: TypeAlias = Annotated[
    str | None,
    typer.Option(metavar="DEVICE", help="Default: cuda if there is a GPU, else cpu.", rich_help_panel=MODEL),
]
Precision: TypeAlias = Annotated[
    str, typer.Option(help='What the towers hold their weights in: "fp32", "fp16", "bf16".', rich_help_panel=MODEL)
]
ClassesFile: TypeAlias = Annotated[
    Path | None, names_file("Class names, one a line, or as JSON: a list, or an object of names and indices.")
]
OwnOptions: TypeAlias = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME=VALUE",
        help="An option of the method's own, such as gamma=0.1 of zero; `tpt-fast methods` shows them. Repeatable.",
        rich_help_panel=TUNING,
    ),
]

# --- options that are fields

#: Annotation of a field -> type of its option.
_TYPES: dict[str, Any] = {
    "bool": bool,
    "float": float,
    "int": int,
    "int | None": int | None,
    "str": str,
    "str | Method | Sequence[str | Method] | Mapping[str, Method]": str,
    "Tensor | CoCoOp | str | os.PathLike | None": Path | None,
}


class FieldOptions:
    """Options for the fields of a dataclass.

    Args:
        of: the dataclass, each field with its meaning (:func:`tpt_fast._fields.described`).
        panels: field -> heading of ``--help`` that its option stands under.
        panel: of all other fields.
        renamed: field -> name of its option, where that is another.
        meanings: field -> help, where the command line has to say something else.
        without: fields that the command sets itself.
    """

    def __init__(
        self,
        of: type,
        panel: str,
        panels: Mapping[str, str] | None = None,
        renamed: Mapping[str, str] | None = None,
        meanings: Mapping[str, str] | None = None,
        without: Sequence[str] = (),
    ) -> None:
        self._of, self._panel = of, panel
        self._fields = [each for each in fields(of) if each.name not in without]
        self._panels, self._renamed, self._meanings = panels or {}, renamed or {}, meanings or {}

    def option(self, field: str) -> str:
        """The option's name on the command line."""
        return f"--{self._renamed.get(field, field).replace('_', '-')}"

    def option_in(self, message: str) -> str | None:
        """The option that an error speaks of, which begins with its field."""
        found = re.match(r"(\w+): ", message)
        names = {each.name for each in fields(self._of)}
        return self.option(found[1]) if found and found[1] in names else None

    def __call__(self, command: Callable) -> Callable:
        """Put an option for each field in the place of ``command``'s last parameter, which is ``**options``."""
        own = list(inspect.signature(command, eval_str=True).parameters.values())[:-1]
        ours = [self._parameter(each) for each in self._fields]

        @functools.wraps(command)
        def called(**given: Any) -> Any:
            return command(**given)

        # Options of a panel stand together in the help: the model's, the tuning's, the output's.
        last = [each for each in own if _panel_of(each) not in (None, *self._panels.values(), self._panel)]
        parameters = [each for each in own if each not in last] + ours + last
        signature = inspect.Signature([each.replace(kind=each.KEYWORD_ONLY) for each in parameters])
        called.__signature__ = signature  # type: ignore[attr-defined]
        called.__annotations__ = {each.name: each.annotation for each in parameters}
        return called

    def _parameter(self, field: Any) -> inspect.Parameter:
        kind, name = _TYPES[field.type], self.option(field.name)
        if field.default is True:
            name = f"{name}/--no-{name[2:]}"
        meaning = self._meanings.get(field.name, field.metadata["help"])
        option = typer.Option(
            name,
            help=escape(meaning),
            rich_help_panel=self._panels.get(field.name, self._panel),
            metavar=_metavar(kind),
        )
        return inspect.Parameter(
            field.name, inspect.Parameter.KEYWORD_ONLY, default=field.default, annotation=Annotated[kind, option]
        )


def tuning_fields(without: Sequence[str] = ()) -> FieldOptions:
    """Those of TuneConfig, but for some fields."""
    return FieldOptions(
        TuneConfig,
        TUNING,
        panels=dict.fromkeys(("precision", "engine", "activations", "decoder", "cuda_graphs"), MODEL),
        renamed={"n_views": "views", "views": "augment"},
        meanings={
            "precision": 'What the towers hold their weights in: "fp32", "fp16", "bf16"; or "auto": fp32 or bf16, '
            "which is faster here, measured once.",
            "ctx": "Start from a checkpoint of CoOp or CoCoOp, or from a context in safetensors, instead.",
            "method": "What is done with the views; `tpt-fast methods` shows the names. With commas several.",
        },
        without=without,
    )


def own_options(given: Sequence[str], others: Mapping[str, Any]) -> dict[str, Any]:
    """Options of a method from ``NAME=VALUE`` each: a value is a Python literal, or else text.

    Raises:
        typer.BadParameter: another form, one of ``others``, which has an option of its own, or a name twice.
    """
    found: dict[str, Any] = {}
    for each in given:
        name, sign, text = each.partition("=")
        if not sign or not name.isidentifier():
            raise typer.BadParameter(f"expected NAME=VALUE, got {each!r}", param_hint="--option")
        if name in others or name in found:
            why = "is an option of the command itself" if name in others else "was given twice"
            raise typer.BadParameter(f"{name} {why}", param_hint="--option")
        try:
            found[name] = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            found[name] = text
    return found


def _panel_of(parameter: inspect.Parameter) -> str | None:
    found = [each for each in getattr(parameter.annotation, "__metadata__", ()) if hasattr(each, "rich_help_panel")]
    return found[0].rich_help_panel if found else None


def _metavar(kind: Any) -> str | None:
    return "FILE" if kind == Path | None else None
