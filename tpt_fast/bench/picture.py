"""Where the time of whole images goes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from .._files import atomic_write
from .rows import Row


def draw(rows: Sequence[Row], path: Path) -> None:
    """A bar a case: the seconds of each stage, and beside it what the published algorithm took.

    Raises:
        ImportError: there is no matplotlib.
        ValueError: there are no rows of single images, or ``path`` has an ending of no picture.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("a picture needs matplotlib: pip install 'tpt_fast[plot]'") from error

    ours = {row["case"]: row for row in rows if "shares" in row}
    if not ours:
        raise ValueError("rows: expected some of single images, got none")
    theirs = {row["case"]: row["median"] for row in rows if row["backend"] == "published"}
    figure = Figure(figsize=(9, 1.2 + 0.7 * len(ours)), layout="constrained")
    axes = figure.subplots()
    stages = list(dict.fromkeys(stage for row in ours.values() for stage in row["shares"]))
    left = dict.fromkeys(ours, 0.0)
    for stage in stages:
        widths = [row["shares"].get(stage, 0) * row["median"] for row in ours.values()]
        axes.barh([y - 0.2 for y in range(len(ours))], widths, 0.38, list(left.values()), label=stage)
        left = {case: begin + width for (case, begin), width in zip(left.items(), widths, strict=True)}
    slow = [theirs.get(case, 0) for case in ours]
    axes.barh([y + 0.2 for y in range(len(ours))], slow, 0.38, color="lightgrey", label="published")
    axes.set(yticks=range(len(ours)), yticklabels=ours, xlabel="seconds an image")
    axes.invert_yaxis()
    figure.legend(loc="outside right upper", fontsize="small")
    with atomic_write(path) as aside:
        figure.savefig(aside, dpi=150)
