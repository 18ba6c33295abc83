"""``tpt-fast words``: what a context says, and whose it is."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from . import _models, _shared
from ._options import MODEL, Pretrained

if TYPE_CHECKING:
    from torch import Tensor

    from ..clip import Clip


def words(
    file: Annotated[
        Path,
        typer.Argument(
            metavar="FILE",
            exists=True,
            dir_okay=False,
            help="A context: safetensors, or a checkpoint of CoOp or CoCoOp.",
        ),
    ],
    model: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help="The model whose context it is. Default: the small demo model.", rich_help_panel=MODEL
        ),
    ] = None,
    pretrained: Pretrained = None,
    top: Annotated[int, typer.Option(min=1, help="Words for each vector.")] = 5,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a line for each vector.")] = False,
    relabel: Annotated[
        Path | None,
        typer.Option(
            metavar="OUT",
            dir_okay=False,
            help="Write the context anew, as safetensors, as one of this model, though its header names another.",
        ),
    ] = None,
) -> None:
    """Show a context as the words nearest to its vectors, with their distances.

    Of a CoCoOp these are the words of the context that it moves for each image.

    A file that names another model than --model is refused, unless it is written anew with --relabel.

    Exit codes: 0 fine, 2 bad usage, 3 a problem of the environment.
    """
    _models.check_weights(model, pretrained)
    _shared.check_stdout()
    with _shared.environment():
        from ..clip import Clip
        from ..prompting.checkpoint import read_header
        from ..prompting.cocoop import CoCoOp, load_start
        from ..prompting.saved import check_header

        loaded = _models.load(model, pretrained, "cpu")
        clip = Clip(loaded.model, tokenizer=loaded.tokenizer, engine="module")
        with _shared.usage("FILE"):
            header = read_header(file)
            classnames = json.loads(header.get("classnames", "null"))
            start = load_start(file, clip.text.width)
            if relabel is None:
                check_header(file, clip.text)
        if relabel is not None:
            _relabel(start, relabel, clip, model, header.get("name_at"), classnames)
        ctx = start.ctx if isinstance(start, CoCoOp) else start
        rows = [*_rows(ctx, clip, top, classnames)]
    if as_json:
        for row in rows:
            _shared.json_line(row)
    else:
        _shared.print_table(_table(rows))


def _relabel(ctx: Any, path: Path, clip: Clip, model: str | None, name_at: str | None, names: Any) -> None:
    from ..prompting.saved import save_ctx

    ctx_init = {"end": "a", "front": "[CLS] a"}.get(name_at or "", name_at)
    try:
        save_ctx(ctx, path, clip, name=model, ctx_init=ctx_init, classnames=names)
    except OSError as error:
        raise typer.BadParameter(f"{path} cannot be written: {error.strerror}", param_hint="--relabel") from error


def _rows(ctx: Tensor, clip: Clip, top: int, classnames: list[str] | None) -> Iterator[dict[str, Any]]:
    from ..prompting.words import nearest_words

    for i, context in enumerate(ctx[None] if ctx.dim() == 2 else ctx):
        whose = {} if ctx.dim() == 2 else {"class": i if classnames is None else classnames[i]}
        for vector, near in enumerate(nearest_words(context, clip, top), 1):
            found = [{"word": word.text, "distance": word.distance} for word in near]
            yield {**whose, "vector": vector, "length": context[vector - 1].norm().item(), "words": found}


def _table(rows: list[dict[str, Any]]) -> Table:
    specific = "class" in rows[0]
    table = Table(*(["class"] if specific else []), "vector", "length", "nearest words, and how far they are")
    for row in rows:
        said = ", ".join(f"{each['word']} {each['distance']:.3f}" for each in row["words"])
        cells = str(row["vector"]), f"{row['length']:.3f}", Text(_shared.shown(said))
        table.add_row(*([Text(_shared.shown(str(row["class"])))] if specific else []), *cells)
    return table
