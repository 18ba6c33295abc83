"""``tpt-fast tune``: classify images with a prompt tuned for each."""

from __future__ import annotations

import hashlib
import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..config import TuneConfig
from . import _models, _shared
from ._class_names import class_names
from ._images import find_images
from ._options import ClassesFile, Device, ModelName, OwnOptions, Pretrained, own_options, tuning_fields

if TYPE_CHECKING:
    from torch import Tensor

    from ..prompting.cocoop import CoCoOp
    from ..tuner import Tuner
    from ._results_file import ResultsFile

_OUTPUT = "Output"
_FIELDS = tuning_fields()


@_FIELDS
def tune(
    images: Annotated[list[str], typer.Argument(metavar="IMAGE", help="Image files, or folders of them.")],
    classes: Annotated[
        str | None,
        typer.Option(metavar="A,B,C", help="Class names. Default: the demo model's hundred."),
    ] = None,
    classes_file: ClassesFile = None,
    model: ModelName = None,
    pretrained: Pretrained = None,
    device: Device = None,
    option: OwnOptions = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="One JSON object a line for each image.", rich_help_panel=_OUTPUT)
    ] = False,
    top: Annotated[int, typer.Option(min=1, help="Classes in `top` of each row.", rich_help_panel=_OUTPUT)] = 5,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            dir_okay=False,
            help="Write each row here at once: .csv, .jsonl, or .parquet (needs pyarrow).",
            rich_help_panel=_OUTPUT,
        ),
    ] = None,
    resume: Annotated[
        bool,
        typer.Option("--resume", help="Go on with --out FILE: skip the images that it has.", rich_help_panel=_OUTPUT),
    ] = False,
    plot: Annotated[
        Path | None,
        typer.Option(metavar="FILE", dir_okay=False, help="Picture of one image's tuning.", rich_help_panel=_OUTPUT),
    ] = None,
    plot_dir: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", file_okay=False, help="A picture for each image.", rich_help_panel=_OUTPUT),
    ] = None,
    **options: Any,
) -> None:
    """Classify images with a prompt tuned for each.

    Where folders have the names of classes, accuracy and confusions are shown at the end.

    Exit codes: 0 all fine, 1 some image failed (its row says why), 2 bad usage, 3 a problem of the environment.
    """
    names = class_names(classes, classes_file)
    if model is not None and names is None:
        raise typer.BadParameter("--model needs class names: --classes or --classes-file", param_hint="--classes")
    _models.check_weights(model, pretrained)
    if resume and out is None:
        raise typer.BadParameter("it goes with --out FILE", param_hint="--resume")
    if out is None or as_json:
        _shared.check_stdout()

    with _shared.environment():
        with _shared.usage(_FIELDS.option_in):
            config = TuneConfig.of(**options, **own_options(option or (), options))
        files, unreadable = find_images(images)
        pictures = _pictures(files, plot, plot_dir)
        if plot is not None:
            _shared.check_picture(plot, "--plot")

        import numpy as np
        import torch

        from ._run import run

        loaded = _models.load(model, pretrained, device)
        if model is None and names:
            _models.warn_of_strange(names, loaded.tokenizer)
        names = names or list(loaded.classnames)
        _shared.kernels(_models.place_of(device))
        tuner = _tuner(loaded, names, config)
        if plot_dir is not None:  # bad usage, which ends above, leaves no folder behind
            _make_folder(plot_dir)
            _shared.check_picture(next(iter(pictures.values())), "--plot-dir")
        results_file = None
        if out is not None:
            results_file = _results_file(out, resume, tuner, {"model": model, "top": top, **_weights(pretrained)})
        if config.strict_official:  # the published code draws from the global generators
            torch.manual_seed(config.seed)
            np.random.seed(config.seed % 2**32)
        summary = run(tuner, files, as_json=as_json, top=top, pictures=pictures, results_file=results_file)
    if summary.failed:
        _shared.remark(f"{summary.failed} of {summary.done} images failed")
    if summary.failed or unreadable:
        raise typer.Exit(_shared.IMAGE_FAILED)


def _tuner(loaded: _models.Loaded, names: list[str], config: TuneConfig) -> Tuner:
    """A Tuner; every error of an option names it."""
    import torch

    from .._machine import free_bytes
    from ..clip import Clip
    from ..prompting.cocoop import load_start
    from ..prompting.saved import check_header
    from ..tuner import Tuner

    with _shared.waiting("encoding the class names"):
        with _shared.usage(_FIELDS.option_in):
            clip = Clip.of(loaded.model, config, loaded.tokenizer)
        if config.ctx is not None:
            with _shared.usage("--ctx", anything=True):
                check_header(config.ctx, clip.text, config.ctx_init, names)
                start = load_start(config.ctx, clip.text.width, normalised=not config.strict_official)
                config = replace(config, ctx=start)
        with _shared.usage(_FIELDS.option_in):
            tuner = Tuner(clip, names, config)
        one = tuner.prepare(torch.zeros(8, 8, 3, dtype=torch.uint8), torch.tensor([[0, 0, 8, 8, 0]])).views[0].nbytes
    needed, free = 4 * config.n_views * one, free_bytes(tuner.device)  # a stream has up to four images' under way
    if needed > free:
        message = f"{config.n_views} views of four images at once take {needed / 1e9:.3g} GB; {free / 1e9:.3g} are free"
        raise typer.BadParameter(message, param_hint=_FIELDS.option("n_views"))
    return tuner


def _results_file(out: Path, resume: bool, tuner: Tuner, made_with: dict[str, Any]) -> ResultsFile:
    from ._results_file import ResultsFile

    if resume and (tuner.config.strict_official or tuner.method.online):
        message = f"an answer of method {tuner.method.name!r} depends on the images before it, which would be skipped"
        raise typer.BadParameter(message, param_hint="--resume")
    options = {_FIELDS.option(name): value for name, value in vars(tuner.config).items()}
    if not isinstance(options["--method"], str):  # with options of its own
        options["--method"] = repr(options["--method"])
    if (ctx := options["--ctx"]) is not None:
        options["--ctx"] = _digest(ctx)
    return ResultsFile(out, {"classes": list(tuner.classnames), **made_with, **options}, resume)


def _digest(ctx: Tensor | CoCoOp) -> str:
    from ..prompting.cocoop import CoCoOp

    parts = ctx.tensors() if isinstance(ctx, CoCoOp) else (ctx,)
    digest = hashlib.sha256(b"".join(each.contiguous().numpy().tobytes() for each in parts)).hexdigest()
    return f"{digest}, features as they are" if isinstance(ctx, CoCoOp) and not ctx.normalised else digest


def _weights(pretrained: str | None) -> dict[str, str | None]:
    """What says which weights they are: a tag, or what a file holds."""
    if pretrained is None or not os.path.isfile(pretrained):
        return {"weights": pretrained}
    digest = hashlib.sha256()
    with open(pretrained, "rb") as file:
        while part := file.read(1 << 20):
            digest.update(part)
    return {"weights": digest.hexdigest()}


def _pictures(files: list[Path], plot: Path | None, plot_dir: Path | None) -> dict[Path, Path]:
    if plot is not None and plot_dir is not None:
        raise typer.BadParameter("give --plot or --plot-dir, not both", param_hint="--plot")
    if plot is not None and len(files) > 1:
        raise typer.BadParameter(f"one picture for {len(files)} images; use --plot-dir", param_hint="--plot")
    if plot is not None:
        option, pictures = "--plot", {files[0]: plot}
    elif plot_dir is not None:
        option, pictures = "--plot-dir", _in_folder(plot_dir, files)
    else:
        return {}
    images = set(map(os.path.realpath, files))
    for picture in pictures.values():
        if os.path.realpath(picture) in images:
            raise typer.BadParameter(f"{picture} is one of the images", param_hint=option)
    return pictures


def _in_folder(folder: Path, files: list[Path]) -> dict[Path, Path]:
    pictures: dict[Path, Path] = {}
    taken: set[Path] = set()
    for file in files:
        target, number = folder / f"{file.stem}.png", 1
        while target in taken:  # images of one name from several folders
            number += 1
            target = folder / f"{file.stem}-{number}.png"
        taken.add(target)
        pictures[file] = target
    return pictures


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise typer.BadParameter(f"{folder} cannot be made: {error.strerror}", param_hint="--plot-dir") from error
