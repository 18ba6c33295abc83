"""``tpt-fast demo``: everything at once, with what ships in the package."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import _models, _shared

if TYPE_CHECKING:
    from ..tuner import Tuner

NEXT = """
Your photographs:      tpt-fast tune PHOTO.jpg (among the hundred things that this model knows)
Any names, by CLIP:    tpt-fast tune PHOTO.jpg --classes cat,dog,horse --model ViT-B-16-quickgelu --pretrained openai
How fast it is here:   tpt-fast bench-demo"""


def demo(
    out: Annotated[
        Path | None,
        typer.Option(metavar="PNG", dir_okay=False, help="The picture. Default: tpt-fast-demo.png, given matplotlib."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a line for each photograph.")] = False,
) -> None:
    """Classify the photographs that ship with the package by the demo model, and draw what tuning did to one.

    The demo model knows a hundred everyday things. Tuning corrects its answer for the first photograph; for the last
    one it stays wrong.
    """
    _shared.check_stdout()
    with _shared.environment():
        from importlib.util import find_spec

        from ..demo import PHOTO_FOLDER, PHOTOS
        from ..tuner import Tuner
        from ._run import run

        if out is not None:
            _shared.check_picture(out, "--out")
        loaded = _models.load_demo()
        _shared.kernels()
        tuner = Tuner(loaded.model, loaded.classnames, tokenizer=loaded.tokenizer)
        files = [PHOTO_FOLDER / name for name in PHOTOS]
        found: list[dict[str, Any]] = []
        _shared.remark(
            f"A small model of {len(loaded.classnames)} everyday things names {len(files)} photographs: with one "
            "prompt for all (zero-shot), and with the prompt tuned for each (label), so that its surest views agree: "
            "their entropy falls."
        )
        if run(tuner, files, as_json=as_json, base=PHOTO_FOLDER, summarise=False, seen=found.append).failed:
            _shared.stop("the photographs of this installation cannot be read")
        for row in found:
            if said := _lesson(row, PHOTOS[row["file"]]):
                _shared.remark(said, style="")
        if find_spec("matplotlib") is None:
            _shared.remark("For a picture of what tuning did: pip install matplotlib, and once more.")
        else:
            _draw(tuner, files[0], out or Path("tpt-fast-demo.png"))
        _shared.remark(NEXT, style="")


def _draw(tuner: Tuner, file: Path, picture: Path) -> None:
    try:
        with _shared.waiting("drawing"):
            tuner(file, keep_views=True).plot(picture)
    except OSError as error:
        _shared.stop(f"{picture} cannot be written: {error.strerror or error}")
    _shared.remark(f"The views of {file.name}, and what tuning did to its classes: {picture}")


def _lesson(row: dict[str, Any], truth: str) -> str:
    """What a photograph shows of the method, in one line; "" where both answers are right."""
    file, before, after = row["file"], row["zero_shot_label"], row["label"]
    if before != truth and after == truth:
        return f"{file}: tuning corrects {before!r}: the views that the model is surest of say {truth!r}."
    if after != truth:
        return (
            f"{file} shows a {truth} and stays wrong: tuning makes an answer surer, and cannot know that it is right."
        )
    return ""
