"""``tpt-fast eval``: methods over image sets, and the table."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..config import TuneConfig
from . import _models, _shared
from ._options import TUNING, Device, ModelName, OwnOptions, Pretrained, own_options, tuning_fields
from .report import show, write

if TYPE_CHECKING:
    from ..clip import Clip
    from ..evaluation.run import Progress
    from ..evaluation.sets import ImageSet

_SETS, _OUTPUT = "Image sets", "Output"
_FIELDS = tuning_fields(without=("seed",))


@_FIELDS
def evaluate(
    sets: Annotated[
        list[str],
        typer.Argument(metavar="SET", help="Image sets by name, or folders, tables and tars of images."),
    ],
    out: Annotated[
        Path,
        typer.Option(
            metavar="FOLDER",
            file_okay=False,
            help="Rows and reports; what it has is not done again.",
            rich_help_panel=_OUTPUT,
        ),
    ],
    root: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER", exists=True, file_okay=False, help="Below which named sets lie.", rich_help_panel=_SETS
        ),
    ] = None,
    as_published: Annotated[
        bool,
        typer.Option(
            "--as-published",
            help="Class lists as published, with their faults; and views and options as the methods' authors set them.",
            rich_help_panel=_SETS,
        ),
    ] = False,
    subset: Annotated[
        bool,
        typer.Option("--subset", help="A part of a set is enough: say less of what is missing.", rich_help_panel=_SETS),
    ] = False,
    model: ModelName = None,
    pretrained: Pretrained = None,
    device: Device = None,
    seeds: Annotated[
        str, typer.Option(metavar="0,1,2", help="Of the views: one run for each.", rich_help_panel=TUNING)
    ] = "0",
    option: OwnOptions = None,
    features: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            file_okay=False,
            help="Keep the features of all views here, and read them instead of images where they are kept.",
            rich_help_panel=_OUTPUT,
        ),
    ] = None,
    look: Annotated[
        bool,
        typer.Option(
            "--preflight/--no-preflight",
            help="Before the first image of a set, ask the model about a few hundred: permuted labels end it.",
            rich_help_panel=_SETS,
        ),
    ] = True,
    workers: Annotated[int, typer.Option(min=1, help="Threads that decode ahead.", rich_help_panel=_SETS)] = 2,
    every: Annotated[
        float,
        typer.Option(min=0, help="Seconds after which rows are written.", rich_help_panel=_OUTPUT),
    ] = 30.0,
    **options: Any,
) -> None:
    """Run methods over image sets: accuracy, calibration, intervals, and the papers' figures beside them.

    Each image is read and encoded once for all methods. A run that was ended goes on where it was when it is given
    again. Under torchrun (`torchrun --nproc-per-node 8 -m tpt_fast eval ...`) the images are shared out.

    Exit codes: 0 all fine, 1 some image failed (its row says why), 2 bad usage, 3 a problem of the environment.
    """
    _models.check_weights(model, pretrained)
    numbers = _numbers(seeds)
    with _shared.environment(), _group() as rank:
        with _shared.usage(_FIELDS.option_in):
            config = TuneConfig.of(**options, **own_options(option or (), options | {"seed": None}))

        from ..clip import Clip
        from ..evaluation.published import published_config
        from ..evaluation.report import report
        from ..evaluation.run import evaluate
        from ..evaluation.sets import open_set

        with _shared.usage("SET", anything=True):
            opened = [open_set(name, root, as_published=as_published, subset=subset) for name in sets]
        for each in opened if rank == 0 else []:
            for note in each.notes:
                _shared.remark(f"{each.name}: {note}")
        place = _place(device)
        loaded = _models.load(model, pretrained, place)
        _shared.kernels(_models.place_of(place))
        with _shared.usage(_FIELDS.option_in):
            clip = Clip.of(loaded.model, config, loaded.tokenizer)
        for images in opened if look and rank == 0 else []:
            _look_before(images, clip, config, out)
        with _options_named():
            configs = [published_config(config, each.name) if as_published else config for each in opened]
        for name, images, settings in zip(sets, opened, configs):
            where = None if root is None else str(root.resolve())
            source = {"set": name, "root": where, "as_published": as_published, "subset": subset}
            about = {"model": model, "pretrained": pretrained, "source": source}
            with _options_named(), _bars(rank) as seen:
                evaluate(
                    images, clip, settings, out=out, seeds=numbers, features=features,
                    workers=workers, every=every, about=about, seen=seen,
                )  # fmt: skip
        _wait_for_all()
        if rank != 0:
            return
        found = report(out)
        try:
            show(found)
        finally:  # even if nobody reads that any more
            write(found, out)
    failed = sum(max((each.failed for each in of_set.methods), default=0) for of_set in found)
    if failed:
        _shared.remark(f"{failed} images failed")
        raise typer.Exit(_shared.IMAGE_FAILED)


def _numbers(seeds: str) -> list[int]:
    try:
        return [int(each) for each in seeds.split(",")]
    except ValueError:
        raise typer.BadParameter(f"expected numbers with commas, got {seeds!r}", param_hint="--seeds") from None


def _look_before(images: ImageSet, clip: Clip, config: TuneConfig, out: Path) -> None:
    """End with the map of permuted labels, if they are; unless there are rows already."""
    from ..evaluation.folder import set_folder
    from ..evaluation.preflight import preflight
    from ..evaluation.rows import parts
    from ..evaluation.run import zero_shot_predictor

    if config.autocasts or parts(set_folder(out, images.name) / "rows"):
        return
    with _shared.waiting(f"looking at {images.name}"):
        found = preflight(images, zero_shot_predictor(images, clip, config))
    with _shared.usage("SET"):
        found.check()
    said = found.message or f"{images.name}: zero-shot, {found.accuracy:.1%} of {found.images} images are right"
    _shared.remark(said)


@contextmanager
def _options_named() -> Iterator[None]:
    """A ValueError that begins with the name of an option is bad usage of it, and any other what it is."""
    others = {"weights": "--pretrained", "shards": "--method"}
    others |= {name: f"--{name}" for name in ("seeds", "out", "features", "workers")}
    try:
        yield
    except ValueError as error:
        name = str(error).partition(":")[0]
        option = _FIELDS.option_in(str(error)) or others.get(name) or ("--option" if name.isidentifier() else None)
        if option is None:
            raise
        raise typer.BadParameter(str(error), param_hint=option) from error


def _place(device: str | None) -> str | None:
    """Of several processes on a machine with GPUs each has one of its own."""
    import torch

    if device in (None, "cuda") and "LOCAL_RANK" in os.environ and torch.cuda.is_available():
        return f"cuda:{int(os.environ['LOCAL_RANK']) % torch.cuda.device_count()}"
    return device


@contextmanager
def _group() -> Iterator[int]:
    """The process group that torchrun has started, if it has; its rank."""
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        yield 0
        return
    from torch import distributed

    try:
        distributed.init_process_group("gloo", timeout=timedelta(days=7))  # shares take unequal time
    except (RuntimeError, ValueError) as error:
        _shared.stop(f"WORLD_SIZE is {os.environ['WORLD_SIZE']}, and there is no process group: {error}")
    try:
        yield distributed.get_rank()
    finally:
        distributed.destroy_process_group()


def _wait_for_all() -> None:
    from torch import distributed

    if distributed.is_available() and distributed.is_initialized():
        distributed.barrier()


@contextmanager
def _bars(rank: int) -> Iterator[Any]:
    """A bar for each seed, with the running accuracy of each method; the first process shows its own share."""
    from tqdm import tqdm

    bar: tqdm | None = None
    shown: Any = None

    def seen(progress: Progress) -> None:
        nonlocal bar, shown
        if rank != 0:
            return
        if shown is not progress:
            if bar is not None:
                bar.close()
            shown = progress
            bar = tqdm(
                total=progress.total,
                desc=_shared.shown(f"{progress.set}, seed {progress.seed}"),
                unit="img",
                mininterval=0.2 if sys.stderr.isatty() else 30,
                dynamic_ncols=True,
            )
        assert bar is not None
        answered = max(progress.done - progress.failed, 1)
        rates = [f"{name} {right / answered:.1%}" for name, right in progress.right.items()]
        failed = [f"{progress.failed} failed"] if progress.failed else []
        bar.set_postfix_str(", ".join(rates + failed), refresh=False)
        bar.update()

    try:
        yield seen
    finally:
        if bar is not None:
            bar.close()
