"""Timing several things side by side."""

from __future__ import annotations

import math
import time
from collections.abc import Callable


def take_turns(runs: dict[str, Callable], repeats: int, seconds: float = math.inf) -> dict[str, list[float]]:
    """Seconds of each call of each of ``runs``.

    They take turns, so that a busy moment meets them all, until each has run ``repeats`` times. One whose next call
    would bring its own calls to more than ``seconds`` together stops before it; each runs once at least. Nothing is
    called before its time is taken: warm up first.
    """
    taken: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            before = taken[name]
            if before and sum(before) * (len(before) + 1) / len(before) > seconds:
                continue
            started = time.perf_counter()
            run()
            before.append(time.perf_counter() - started)
    return taken
