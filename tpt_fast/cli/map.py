"""``tpt-fast map``: where in an image the classes are."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from .._files import atomic_write
from . import _models, _shared
from ._class_names import class_names
from ._options import MODEL, ClassesFile, Device, Precision, Pretrained

if TYPE_CHECKING:
    from torch import Tensor

    from ..clip import Clip

_MAP, _OUTPUT = "Map (defaults: NACLIP's)", "Output"


def map_image(
    image: Annotated[str, typer.Argument(metavar="IMAGE", help="An image file.")],
    classes: Annotated[str | None, typer.Option(metavar="A,B,C", help="Class names.")] = None,
    classes_file: ClassesFile = None,
    model: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="An open_clip model with a vision transformer.", rich_help_panel=MODEL),
    ] = None,
    pretrained: Pretrained = None,
    device: Device = None,
    precision: Precision = "fp32",
    tokens: Annotated[
        str,
        typer.Option(
            help='"neighbourhood" attention in the last block (NACLIP), or "raw" patch tokens (DenseCLIP).',
            rich_help_panel=_MAP,
        ),
    ] = "neighbourhood",
    std: Annotated[
        float, typer.Option(help="Deviation of the neighbourhood's Gaussian, in patches.", rich_help_panel=_MAP)
    ] = 5.0,
    size: Annotated[
        int | None,
        typer.Option(
            help="Pixels that the image's shorter side is resized to, the model's own size or more. "
            "Default: 3/2 of that.",
            rich_help_panel=_MAP,
        ),
    ] = None,
    stride: Annotated[
        int | None,
        typer.Option(
            help="Pixels from window to window; a window has the model's own size. Default: half of it.",
            rich_help_panel=_MAP,
        ),
    ] = None,
    ctx: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Prompt from a CoOp checkpoint, or a context in safetensors.", rich_help_panel=_MAP
        ),
    ] = None,
    tuned: Annotated[
        bool,
        typer.Option("--tuned", help="With the prompt tuned for this image by TPT first.", rich_help_panel=_MAP),
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="One JSON object a line for each class.", rich_help_panel=_OUTPUT)
    ] = False,
    plot: Annotated[
        Path | None,
        typer.Option(metavar="FILE", dir_okay=False, help="Picture of the maps.", rich_help_panel=_OUTPUT),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="NPY",
            dir_okay=False,
            help="The scores, float32 of (classes, height, width), as NumPy reads them.",
            rich_help_panel=_OUTPUT,
        ),
    ] = None,
) -> None:
    """Show where in an image the classes are: the cosine of each of its places and each class.

    A place belongs to the class that it is most like: name the background too, or it goes to what is there. Of each
    class, its share of the places, and its highest score and where that is, are shown.

    Exit codes: 0 fine, 1 the image cannot be read, 2 bad usage, 3 a problem of the environment.
    """
    names = class_names(classes, classes_file)
    if names is None:
        raise typer.BadParameter("which classes? give --classes or --classes-file", param_hint="--classes")
    if model is None:
        message = (
            "the demo model is a ResNet, which has no patch tokens; give a vision transformer, as ViT-B-16-quickgelu"
        )
        raise typer.BadParameter(message, param_hint="--model")
    _shared.check_stdout()
    with _shared.environment():
        if plot is not None:
            _shared.check_picture(plot, "--plot")
        if out is not None:
            _check_out(out)
        from ..clip import Clip
        from ..plot import plot_map
        from ..views.decode import UNREADABLE, load_image

        try:
            pixels = load_image(image)
        except UNREADABLE as error:
            _shared.stop(str(error), _shared.IMAGE_FAILED)
        loaded = _models.load_model(model, pretrained, device)
        _shared.kernels(_models.place_of(device))
        with _shared.usage(_option_in):
            clip = Clip(loaded.model, precision, tokenizer=loaded.tokenizer)
            with _shared.waiting("mapping"):
                prompt = _tuned(clip, names, pixels, ctx) if tuned else ctx
                scores = _scores(clip, pixels, names, prompt, tokens=tokens, std=std, size=size, stride=stride)
        if out is not None:
            _save(scores, out)
        if plot is not None:
            plot_map(scores, pixels, names, plot)
        rows = _rows(scores, names)
        if as_json:
            for row in rows:
                _shared.json_line(row)
        else:
            _shared.print_table(_table(rows))


def _option_in(message: str) -> str | None:
    """The option that an error speaks of, which begins with its name."""
    name = message.partition(":")[0].partition("[")[0]
    if name == "classnames":
        return "--classes"
    return f"--{name}" if name in ("model", "precision", "tokens", "std", "size", "stride", "ctx") else None


def _scores(clip: Clip, pixels: Tensor, names: list[str], ctx: Any, **options: Any) -> Tensor:
    from ..dense import score_map

    return score_map(clip, pixels, names, ctx, **options)


def _tuned(clip: Clip, names: list[str], pixels: Tensor, ctx: Path | None) -> Tensor:
    from ..config import TuneConfig
    from ..dense import square_grid
    from ..tuner import Tuner

    square_grid(clip)  # or it would be refused after the tuning
    return Tuner(clip, names, TuneConfig(ctx=ctx, precision=clip.precision))(pixels).ctx


def _check_out(out: Path) -> None:
    if out.suffix.lower() != ".npy":
        raise typer.BadParameter(f"{out} does not end in .npy", param_hint="--out")
    _shared.check_file(out, "--out")


def _save(scores: Tensor, out: Path) -> None:
    import numpy as np

    with atomic_write(out) as aside:
        np.save(aside, scores.numpy())


def _rows(scores: Tensor, names: list[str]) -> list[dict[str, Any]]:
    """Of each class its share of the pixels, its highest and mean score, and where the highest is."""
    best = scores.argmax(0).flatten().bincount(minlength=len(names)) / scores[0].numel()
    width, flat = scores.shape[-1], scores.flatten(1)
    peaks = flat.argmax(1)
    return [
        {
            "class": name,
            "share": best[i].item(),
            "highest": flat[i, peaks[i]].item(),
            "mean": flat[i].mean().item(),
            "row": int(peaks[i]) // width,
            "column": int(peaks[i]) % width,
        }
        for i, name in enumerate(names)
    ]


def _table(rows: list[dict[str, Any]]) -> Table:
    table = Table("class", "share of the pixels", "highest score", "at row, column", "mean score")
    for column in table.columns[1:]:
        column.justify = "right"
    for row in sorted(rows, key=lambda row: -row["share"]):
        place = f"{row['row']}, {row['column']}"
        cells = f"{row['share']:.1%}", f"{row['highest']:.3f}", place, f"{row['mean']:.3f}"
        table.add_row(Text(_shared.shown(row["class"])), *cells)
    return table
