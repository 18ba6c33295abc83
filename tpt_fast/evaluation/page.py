"""The report as one HTML file, which needs no other and no network."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .._files import atomic_write
from .answers import ZERO_SHOT
from .gallery import KINDS, changed
from .published import Published
from .report import METRICS, SetReport

if TYPE_CHECKING:
    from .sets import ImageSet

_CLASSES = 400  # lines of the table of classes; classes.csv has all


def write_page(reports: list[SetReport], path: Path, open_images: Callable[[SetReport], ImageSet | str]) -> None:
    """Write the page.

    Args:
        open_images: the images of a set, for the gallery's pictures; or why they cannot be had.

    Raises:
        ImportError: jinja2 is missing (``pip install 'tpt_fast[eval]'``).
    """
    try:
        from jinja2 import Environment, FileSystemLoader, StrictUndefined
    except ImportError as error:
        raise ImportError("a report in HTML needs jinja2: pip install 'tpt_fast[eval]'") from error
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"percent": _percent, "number": _number}
    template = environment.get_template("report.html")
    stream = template.stream(sets=(_of_set(each, open_images(each)) for each in reports), metrics=METRICS, kinds=KINDS)
    with atomic_write(path) as aside:
        stream.dump(str(aside), "utf-8")


def _of_set(of_set: SetReport, images: ImageSet | str) -> dict[str, Any]:
    names = of_set.about["classnames"]
    others = [each for each in of_set.methods if each.label != ZERO_SHOT]
    order = sorted(range(len(names)), key=lambda i: others[0].per_class[i] if others else 0.0)
    classes = [i for i in order if of_set.class_images[i]]
    return {
        "report": of_set,
        "methods": [_of_method(each) for each in of_set.methods],
        "classes": [(names[i], of_set.class_images[i], [m.per_class[i] for m in of_set.methods]) for i in classes][
            :_CLASSES
        ],
        "classes_left_out": max(0, len(classes) - _CLASSES),
        "diagrams": [(each.label, reliability(each.calibration), each.mean) for each in of_set.methods],
        "no_pictures": images if isinstance(images, str) else "",
        "galleries": [
            (each.label, list(changed(of_set, each.label, None if isinstance(images, str) else images)))
            for each in others
            if any(zero_shot.label == ZERO_SHOT for zero_shot in of_set.methods)
        ],
    }


def _of_method(each: Any) -> dict[str, Any]:
    figure = each.published
    return {
        "each": each,
        "figure": figure if isinstance(figure, Published) else None,
        "reason": "" if isinstance(figure, Published) else figure,
        "seconds": each.seconds_kept if math.isnan(each.seconds) else each.seconds,
        "from_kept": math.isnan(each.seconds) and not math.isnan(each.seconds_kept),
    }


def reliability(calibration: dict[str, list[float]]) -> dict[str, Any]:
    """Bars of a reliability diagram in a square of 200: accuracy by bins of confidence, and how full the bins are."""
    bins, most = len(calibration["images"]), max(calibration["images"], default=0)
    width, bars = 200 / max(bins, 1), []
    for i, (count, accuracy, confidence) in enumerate(
        zip(*(calibration[n] for n in ("images", "accuracy", "confidence")))
    ):
        if count:
            full = 0.25 + 0.75 * count / most
            bars.append((i * width, 200 * (1 - accuracy), 200 * accuracy, 200 * (1 - confidence), full, count))
    return {"width": width, "bars": bars}


def _percent(value: float | None, digits: int = 2) -> str:
    return "" if value is None or math.isnan(value) else f"{100 * value:.{digits}f}"


def _number(value: float | None, digits: int = 3) -> str:
    return "" if value is None or math.isnan(value) else f"{value:.{digits}g}"
