"""From a case to its rows."""

from __future__ import annotations

import statistics
from collections.abc import Callable

from .agreement import Disagreement, compare
from .case import Case
from .peak import Peak
from .rates import matrix_rate
from .rows import Row, add_ratios, digits, row
from .turns import take_turns


def one_image(case: Case, start: str, *, repeats: int, seconds: float, published: bool) -> list[Row]:
    """Rows of one image by tpt_fast and, if ``published``, by the published algorithm, which take turns.

    Args:
        start: one of :data:`~tpt_fast.bench.case.STARTS`.
        repeats, seconds: see :func:`~tpt_fast.bench.turns.take_turns`.

    Raises:
        Disagreement: the answers differ.
    """
    runs = {"tpt_fast": case.ours(start)} | ({"published": case.published(start)} if published else {})
    answers, peaks = _warm_up(case, runs)
    found = {}
    if published:
        differences = compare(answers["tpt_fast"], answers["published"], case.precision)
        found["published"] = {"differences": {name: digits(value) for name, value in differences.items()}}
    rate = matrix_rate(case.device, case.dtype)
    taken = take_turns(runs, repeats, seconds)
    rate = max(rate, matrix_rate(case.device, case.dtype))
    found["tpt_fast"] = case.facts(start, statistics.median(taken["tpt_fast"]), rate)
    return _rows(case, start, taken, peaks, found)


def many_images(case: Case, mode: str, images: int, *, repeats: int, seconds: float) -> list[Row]:
    """The row of ``images`` images in one of :data:`~tpt_fast.bench.case.MODES`; arguments as :func:`one_image`.

    Raises:
        Disagreement: an image was not tuned.
    """
    runs = {"tpt_fast": case.many(mode, images)}
    answers, peaks = _warm_up(case, runs)
    if (found := [result.status for result in answers["tpt_fast"]]) != ["tuned"] * images:
        raise Disagreement(f"expected {images} tuned images, got {', '.join(found)}")
    return _rows(case, f"{mode} of {images}", take_turns(runs, repeats, seconds), peaks, {}, images)


def _warm_up(case: Case, runs: dict[str, Callable]) -> tuple[dict, dict[str, int | None]]:
    """What each returns, and the megabytes by which its first call raises the memory in use."""
    answers, peaks = {}, {}
    for backend, run in runs.items():
        peak = Peak(case.device)
        answers[backend], peaks[backend] = peak.of(run), peak.mb
        if case.device.type == "cuda":  # the second call of a shape captures its graph
            run()
    return answers, peaks


def _rows(
    case: Case, what: str, taken: dict, peaks: dict[str, int | None], found: dict[str, dict], images: int = 1
) -> list[Row]:
    rows = []
    for backend, seconds in taken.items():
        extra = {"images_per_s": digits(images / statistics.median(seconds)), "peak_mb": peaks[backend]}
        extra |= found.get(backend, {})
        rows.append(row("tune", case.title(what), backend, seconds, device=str(case.device), **extra))
    add_ratios(rows)
    return rows
