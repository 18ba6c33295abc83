"""Timing on the GPU if there is one, else on the CPU, and the rates of the machine that the times are held against."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import cache

import torch

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
_CALLS = 20  # in one graph


def synchronize() -> None:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def measure(benchmark, run: Callable, arguments: tuple = (), *, rounds: int, warmup_rounds: int, moved: int = 0):
    """Time ``run(*arguments)``; returns what it returned.

    On CUDA a round ends when the device is done, and ``device`` in the row is what a call takes in the replay of a
    graph of 20, without the host's part (None where ``run`` cannot be captured).

    Args:
        benchmark: pytest-benchmark's fixture.
        moved: bytes that must be read and written; the row then says what share of the measured copy rate this is.
    """

    def synchronised(*given):
        result = run(*given)
        synchronize()
        return result

    result = benchmark.pedantic(synchronised, arguments, rounds=rounds, warmup_rounds=warmup_rounds)
    seconds = benchmark.stats.stats.median if benchmark.stats else None
    if DEVICE.type == "cuda":
        device = replayed(run, arguments)
        benchmark.extra_info["device"] = device and float(f"{device:.4g}")
        seconds = device or seconds
    if moved and seconds:
        benchmark.extra_info.update(moved=moved, copy_gbs=round(copy_rate() / 1e9, 1))
        benchmark.extra_info["copy_share"] = round(moved / seconds / copy_rate(), 3)
    return result


def replayed(run: Callable, arguments: tuple) -> float | None:
    """Seconds of a call in a replayed CUDA graph, or None where ``run`` cannot be captured."""
    stream = torch.cuda.Stream()
    graph, start, end = torch.cuda.CUDAGraph(), *(torch.cuda.Event(enable_timing=True) for _ in range(2))
    try:
        with torch.cuda.stream(stream):
            for _ in range(3):
                run(*arguments)
        stream.synchronize()
        with torch.cuda.graph(graph, stream=stream):
            for _ in range(_CALLS):
                run(*arguments)
    except RuntimeError:
        torch.cuda.synchronize()
        return None
    taken = []
    for _ in range(25):
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        taken.append(start.elapsed_time(end) / 1e3 / _CALLS)
    return sorted(taken[5:])[len(taken[5:]) // 2]


@cache
def copy_rate() -> float:
    """Bytes read and written a second by a copy that no cache holds; the best of some rounds."""
    size = 1 << (30 if DEVICE.type == "cuda" else 28)
    source = torch.ones(size, dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    return 2 * size / _best(lambda: target.copy_(source), 15)


def matrix_rate(rows: int = 1576, width: int = 768, rounds: int = 15, dtype: torch.dtype = torch.float32) -> float:
    """Floating point operations a second of torch's own product at a size of the tower, the best of some rounds."""
    rows *= 8 if DEVICE.type == "cuda" else 1  # all views at once there
    x = torch.randn(rows, width, device=DEVICE, dtype=dtype)
    weight = torch.randn(4 * width, width, device=DEVICE, dtype=dtype)
    return 8 * rows * width**2 / _best(lambda: x @ weight.t(), rounds)


def _best(run: Callable, rounds: int) -> float:
    best = float("inf")
    for _ in range(rounds):
        synchronize()
        started = time.perf_counter()
        run()
        synchronize()
        best = min(best, time.perf_counter() - started)
    return best
