"""``tpt-fast train``: prompts learned from labelled images."""

from __future__ import annotations

import random
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.text import Text

from . import _models, _shared
from ._class_names import class_names
from ._options import Device, ModelName, Precision, Pretrained, names_file

if TYPE_CHECKING:
    from ..clip import Clip
    from ..evaluation.sets import ImageSet
    from ..prompting.train import Trained
    from ..views.decode import ImageLike

_TRAINING, _OUTPUT = "Training (defaults: the published recipe's)", "Output"
KINDS = ("coop", "cocoop")


def train(
    kind: Annotated[
        str, typer.Argument(metavar="coop|cocoop", help="A context for all images, or one that each image moves.")
    ],
    set_: Annotated[
        str,
        typer.Option(
            "--set",
            metavar="NAME|PATH",
            help="Training images: a folder that has a folder for each class, a table or tars; or by name, with --root,"
            " the training part of CoOp's split file.",
        ),
    ],
    out: Annotated[
        Path,
        typer.Option(
            metavar="FILE",
            dir_okay=False,
            help="Checkpoint, written after each epoch, as CoOp's trainer leaves it.",
            rich_help_panel=_OUTPUT,
        ),
    ],
    root: Annotated[
        Path | None, typer.Option(metavar="FOLDER", exists=True, file_okay=False, help="Below which named sets lie.")
    ] = None,
    shots: Annotated[int, typer.Option(min=1, help="Images of each class, drawn by the seed.")] = 16,
    classes_file: Annotated[
        Path | None,
        names_file("Class names in label order, for a table, tars, or folders that are numbered or out of order."),
    ] = None,
    model: ModelName = None,
    pretrained: Pretrained = None,
    device: Device = None,
    precision: Precision = "fp32",
    n_ctx: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Random context vectors to start from; 0 for the words of --ctx-init. Default: 16, of cocoop 0.",
            rich_help_panel=_TRAINING,
        ),
    ] = None,
    ctx_init: Annotated[
        str, typer.Option(help='Words of the context; "[CLS]" marks the class name.', rich_help_panel=_TRAINING)
    ] = "a photo of a",
    csc: Annotated[
        bool, typer.Option("--csc", help="A context for each class (coop).", rich_help_panel=_TRAINING)
    ] = False,
    views: Annotated[
        int,
        typer.Option(
            min=0,
            help="Random crops kept of each image, of which an epoch reads one; as many as epochs for new ones in "
            "each, as published; 0 for the plain image.",
            rich_help_panel=_TRAINING,
        ),
    ] = 8,
    epochs: Annotated[int | None, typer.Option(help="Default: 50, of cocoop 10.", rich_help_panel=_TRAINING)] = None,
    batch_size: Annotated[int | None, typer.Option(help="Default: 32, of cocoop 1.", rich_help_panel=_TRAINING)] = None,
    lr: Annotated[float, typer.Option(help="Learning rate behind the warm-up.", rich_help_panel=_TRAINING)] = 2e-3,
    momentum: Annotated[float, typer.Option(rich_help_panel=_TRAINING)] = 0.9,
    weight_decay: Annotated[float, typer.Option(rich_help_panel=_TRAINING)] = 5e-4,
    warmup_epochs: Annotated[int, typer.Option(rich_help_panel=_TRAINING)] = 1,
    warmup_lr: Annotated[float, typer.Option(help="Learning rate until then.", rich_help_panel=_TRAINING)] = 1e-5,
    seed: Annotated[int, typer.Option(help="Of shots, crops, start and order.", rich_help_panel=_TRAINING)] = 1,
    resume: Annotated[
        bool,
        typer.Option("--resume", help="Go on with --out FILE; the result is the same.", rich_help_panel=_OUTPUT),
    ] = False,
    save_ctx: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            dir_okay=False,
            help="Also as safetensors, with the model's name and digest.",
            rich_help_panel=_OUTPUT,
        ),
    ] = None,
) -> None:
    """Learn a prompt from a few images of each class; `tpt-fast tune --ctx FILE` classifies with it.

    Exit codes: 0 fine, 1 an image cannot be read, 2 bad usage, 3 a problem of the environment.
    """
    if kind not in KINDS:
        raise typer.BadParameter(f"expected one of {', '.join(KINDS)}, got {kind!r}", param_hint="coop|cocoop")
    _models.check_weights(model, pretrained)
    if csc and kind == "cocoop":
        raise typer.BadParameter("cocoop has one context for all classes", param_hint="--csc")
    _check_files(out, resume, save_ctx)
    wanted = class_names(None, classes_file)
    with _shared.environment():
        from ..clip import Clip
        from ..evaluation.sets import open_set
        from ..views.decode import UNREADABLE

        with _shared.usage("--set", anything=True):
            found = open_set(set_, root, classnames=wanted, part="train")
        for note in found.notes:
            _shared.remark(f"{found.name}: {note}")
        files, labels = _draw(found, shots, seed)
        names = [*found.classnames]
        loaded = _models.load(model, pretrained, device)
        _shared.kernels(_models.place_of(device))
        recipe = {"epochs": epochs, "batch_size": batch_size, "lr": lr, "momentum": momentum, "seed": seed}
        recipe |= {"weight_decay": weight_decay, "warmup_epochs": warmup_epochs, "warmup_lr": warmup_lr}
        options: dict[str, Any] = {name: value for name, value in recipe.items() if value is not None}
        options |= {"ctx_init": ctx_init, "views": views, "checkpoint": out, "resume": resume}
        if n_ctx is not None:
            options["n_ctx"] = n_ctx or None
        if csc:
            options["class_specific"] = True
        with _shared.usage(_option_in):
            clip = Clip(loaded.model, precision, tokenizer=loaded.tokenizer)
            features = None
            try:
                from ..prompting.examples import encode_examples

                features = encode_examples(clip, files, views=views, seed=seed)
            except UNREADABLE as error:
                if not str(error).startswith("images["):
                    raise
                _shared.stop(str(error), _shared.IMAGE_FAILED)
            trained = _train(kind, clip, features, labels, names, options)
            if save_ctx is not None:
                _save(trained, save_ctx, clip, model, pretrained, ctx_init, names)
    for epoch, (loss, accuracy) in enumerate(zip(trained.losses, trained.accuracies, strict=True), 1):
        _shared.print_lines(Text(f"epoch {epoch}: loss {loss:.4f}, accuracy {accuracy:.1%}"))
    kept = trained.text.get("kept_bytes", 0) * (options.get("batch_size", 1) if kind == "cocoop" else 1)
    size = features.nbytes + kept
    _shared.remark(f"{len(files)} images, {len(names)} classes; features and kept activations: {size / 1e6:.0f} MB")
    _shared.remark(f"wrote {out}; `tpt-fast tune IMAGE --ctx {out}` classifies with it")


def _train(kind: str, clip: Clip, features: Any, labels: list[int], names: list[str], options: Any) -> Trained:
    from ..prompting import train

    trainer = train.train_coop if kind == "coop" else train.train_cocoop
    try:
        return trainer(clip, features, labels, names, **options)
    except FloatingPointError as error:
        raise ValueError(f"lr: {error}") from error


def _option_in(message: str) -> str | None:
    """The option that an error speaks of, which begins with its name."""
    name = message.partition(":")[0]
    if name == "checkpoint":
        return "--resume"
    if name == "classnames":
        return "--set"
    return f"--{name.replace('_', '-')}" if name.isidentifier() else None


def _check_files(out: Path, resume: bool, save_ctx: Path | None) -> None:
    if out.exists() and not resume:
        raise typer.BadParameter(f"{out} is there; --resume goes on from it", param_hint="--out")
    for option, path in (("--out", out), ("--save-ctx", save_ctx)):
        if path is not None:
            _shared.check_file(path, option)


def _draw(images: ImageSet, shots: int, seed: int) -> tuple[list[ImageLike], list[int]]:
    """``shots`` images of each class, or all where it has no more, and their labels."""
    places: dict[int, list[int]] = {}
    for i in range(len(images)):
        places.setdefault(images.label(i), []).append(i)
    draw = random.Random(seed)
    drawn = [(i, label) for label, of in sorted(places.items()) for i in draw.sample(of, min(shots, len(of)))]
    return [images.image(i) for i, _ in drawn], [label for _, label in drawn]


def _save(
    trained: Trained,
    path: Path,
    clip: Clip,
    model: str | None,
    pretrained: str | None,
    ctx_init: str,
    names: list[str],
) -> None:
    from ..prompting.saved import save_ctx

    said = "the demo model" if model is None else f"{model}, {pretrained}" if pretrained else model
    save_ctx(trained.ctx, path, clip, name=said, ctx_init=ctx_init, classnames=names)
