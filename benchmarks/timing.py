"""Timing an op on the GPU if there is one, else on the CPU."""

from __future__ import annotations

from collections.abc import Callable

import torch

from tpt_fast.bench.rates import copy_rate, matrix_rate, synchronize
from tpt_fast.capturable import Watch

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
_CALLS = 20  # in one graph


def measure(
    benchmark,
    run: Callable,
    arguments: tuple = (),
    *,
    rounds: int,
    warmup_rounds: int,
    moved: int = 0,
    flops: int = 0,
    before: Callable[[], None] | None = None,
):
    """Time ``run(*arguments)``; returns what it returned.

    On CUDA a round ends when the device is done, and ``device`` in the row is what a call takes in the replay of a
    graph of 20, without the host's part (None where ``run`` cannot be captured).

    Args:
        benchmark: pytest-benchmark's fixture.
        moved: bytes that must be read and written; the row then says what share of the measured copy rate this is.
        flops: operations that must be done; likewise of the measured rate of float32 matrix products.
        before: what is called before every round, outside of its time.
    """

    def synchronised(*given):
        result = run(*given)
        synchronize(DEVICE)
        return result

    result = benchmark.pedantic(synchronised, arguments, setup=before, rounds=rounds, warmup_rounds=warmup_rounds)
    seconds = benchmark.stats.stats.median if benchmark.stats else None
    if DEVICE.type == "cuda":
        device = replayed(run, arguments)
        benchmark.extra_info["device"] = device and float(f"{device:.4g}")
        seconds = device or seconds
    if moved and seconds:
        benchmark.extra_info.update(moved=moved, copy_gbs=round(copy_rate(DEVICE) / 1e9, 1))
        benchmark.extra_info["copy_share"] = round(moved / seconds / copy_rate(DEVICE), 3)
    if flops and seconds:
        rate = matrix_rate(DEVICE)
        share = round(flops / seconds / rate, 4)
        benchmark.extra_info.update(flops=flops, matrix_gflops=round(rate / 1e9), matrix_share=share)
    return result


def replayed(run: Callable, arguments: tuple) -> float | None:
    """Seconds of a call in a replayed CUDA graph, or None where ``run`` cannot be captured."""
    stream = torch.cuda.Stream()
    graph, start, end = torch.cuda.CUDAGraph(), *(torch.cuda.Event(enable_timing=True) for _ in range(2))
    with torch.cuda.stream(stream), Watch() as watch:
        run(*arguments)
    stream.synchronize()
    if watch.obstacle:
        return None
    try:
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
