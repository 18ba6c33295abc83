"""``tpt-fast tune``: classify images with a prompt tuned for each."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from . import _models, _shared

SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"}
_MODEL, _TUNING, _OUTPUT = "Model", "Tuning (defaults: the paper's)", "Output"


def tune(
    images: Annotated[list[str], typer.Argument(metavar="IMAGE", help="Image files, or folders of them.")],
    classes: Annotated[
        str | None,
        typer.Option(metavar="A,B,C", help="Class names. Default: the demo model's ten."),
    ] = None,
    classes_file: Annotated[
        Path | None,
        typer.Option(metavar="FILE", exists=True, dir_okay=False, readable=True, help="Class names, one a line."),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="An open_clip model. Default: the small demo model.", rich_help_panel=_MODEL),
    ] = None,
    pretrained: Annotated[
        str | None,
        typer.Option(metavar="TAG|PATH", help="Weights of --model: open_clip's tag or a file.", rich_help_panel=_MODEL),
    ] = None,
    device: Annotated[
        str | None,
        typer.Option(metavar="DEVICE", help="Default: cuda if there is a GPU, else cpu.", rich_help_panel=_MODEL),
    ] = None,
    precision: Annotated[str, typer.Option(help="fp32, fp16 or bf16.", rich_help_panel=_MODEL)] = "fp32",
    decoder: Annotated[
        str, typer.Option(help="Of JPEG files: pillow, or torchvision on the device.", rich_help_panel=_MODEL)
    ] = "pillow",
    engine: Annotated[str, typer.Option(help="Text tower: auto, packed or module.", rich_help_panel=_MODEL)] = "auto",
    views: Annotated[int, typer.Option(help="Views of each image, 2 or more.", rich_help_panel=_TUNING)] = 64,
    rho: Annotated[float, typer.Option(help="Part of the views to keep, in (0, 1].", rich_help_panel=_TUNING)] = 0.1,
    steps: Annotated[int, typer.Option(help="AdamW steps; 0 is zero-shot.", rich_help_panel=_TUNING)] = 1,
    lr: Annotated[float, typer.Option(help="Learning rate.", rich_help_panel=_TUNING)] = 5e-3,
    weight_decay: Annotated[float, typer.Option(help="AdamW's weight decay.", rich_help_panel=_TUNING)] = 0.01,
    ctx_init: Annotated[
        str, typer.Option(help='Initial words; "[CLS]" marks the class name\'s place.', rich_help_panel=_TUNING)
    ] = "a photo of a",
    n_ctx: Annotated[
        int | None,
        typer.Option(help="Start from this many random vectors instead.", rich_help_panel=_TUNING),
    ] = None,
    ctx: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Start from a CoOp checkpoint instead.", rich_help_panel=_TUNING),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the views and of random vectors.", rich_help_panel=_TUNING)] = 0,
    method: Annotated[
        str,
        typer.Option(
            metavar="NAME[,NAME]",
            help="`tpt-fast methods` shows them; of several the first is shown.",
            rich_help_panel=_TUNING,
        ),
    ] = "tpt",
    strict_official: Annotated[
        bool, typer.Option("--strict-official", help="Draw exactly as the published code.", rich_help_panel=_TUNING)
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="One JSON object a line for each image.", rich_help_panel=_OUTPUT)
    ] = False,
    top: Annotated[int, typer.Option(min=1, help="Classes in `top` of --json.", rich_help_panel=_OUTPUT)] = 5,
    plot: Annotated[
        Path | None,
        typer.Option(metavar="FILE", dir_okay=False, help="Picture of one image's tuning.", rich_help_panel=_OUTPUT),
    ] = None,
    plot_dir: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", file_okay=False, help="A picture for each image.", rich_help_panel=_OUTPUT),
    ] = None,
) -> None:
    """Classify images with a prompt tuned for each.

    Exit codes: 0 all fine, 1 some image failed (its row says why), 2 bad usage, 3 a problem of the environment.
    """
    names = _class_names(classes, classes_file)
    files = _files(images)
    pictures = _pictures(files, plot, plot_dir)
    if model is not None and names is None:
        raise typer.BadParameter("--model needs class names: --classes or --classes-file", param_hint="--classes")

    with _shared.environment():
        import torch

        from ..config import TuneConfig
        from ..tuner import Tuner

        options = {"n_views": views, "rho": rho, "steps": steps, "lr": lr, "weight_decay": weight_decay, "seed": seed}
        options |= {"ctx_init": ctx_init, "n_ctx": n_ctx, "ctx": ctx, "precision": precision, "engine": engine}
        options |= {"decoder": decoder, "method": method}
        with _shared.usage():
            config = TuneConfig(strict_official=strict_official, **options)
        if plot is not None:
            _shared.check_picture(plot, "--plot")
        loaded = _models.load_model(model, pretrained, device)
        _shared.kernels(_models.place_of(device))
        with _shared.usage(), _shared.err.status("encoding the class names"):
            tuner = Tuner(loaded.model, names or loaded.classnames, config, tokenizer=loaded.tokenizer)
        if plot_dir is not None:  # bad usage, which ends above, leaves no folder behind
            _make_folder(plot_dir)
            _shared.check_picture(next(iter(pictures.values())), "--plot-dir")
        if strict_official:
            torch.manual_seed(seed)  # the published code draws from the global generator
        failed = _shared.run(tuner, files, as_json=as_json, top=top, pictures=pictures)
    if failed:
        _shared.remark(f"{failed} of {len(files)} images failed")
        raise typer.Exit(_shared.IMAGE_FAILED)


def _class_names(classes: str | None, classes_file: Path | None) -> list[str] | None:
    if classes is None and classes_file is None:
        return None
    if classes is not None and classes_file is not None:
        raise typer.BadParameter("give --classes or --classes-file, not both", param_hint="--classes")
    try:
        parts = classes.split(",") if classes is not None else classes_file.read_text("utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise typer.BadParameter(f"{classes_file} is not UTF-8 text: {error}", param_hint="--classes-file") from error
    names = [part.strip() for part in parts if part.strip()]
    if not names:
        given, option = (classes, "--classes") if classes_file is None else (classes_file, "--classes-file")
        raise typer.BadParameter(f"there are no class names in '{given}'", param_hint=option)
    return names


def _files(images: list[str]) -> list[Path]:
    if "" in images:  # an unset shell variable; Path would make it the current folder
        raise typer.BadParameter("expected a file or folder, got ''", param_hint="IMAGE")
    files: list[Path] = []
    for path in map(Path, images):
        inside = [file for file in sorted(path.rglob("*")) if _is_image(file)] if os.path.isdir(path) else [path]
        if not inside:
            raise typer.BadParameter(f"{path} holds no images ({' '.join(sorted(SUFFIXES))})", param_hint="IMAGE")
        files += inside
    return files


def _is_image(file: Path) -> bool:
    """By its name; a dangling link is one too, as its row says what is wrong."""
    named = file.suffix.lower() in SUFFIXES and not file.name.startswith(".")
    return named and (os.path.isfile(file) or not os.path.exists(file))


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
