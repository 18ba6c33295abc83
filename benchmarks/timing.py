"""Timing an op on the GPU if there is one, else on the CPU."""

from __future__ import annotations

import statistics
from collections.abc import Callable

import torch

from tpt_fast.bench.rates import copy_rate, matrix_rate, synchronize
from tpt_fast.graphs.capturable import ObstacleFinder

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
_CALLS, _REPLAYS = 20, 25  # at most, of a graph
_SECONDS = 2.0  # about the most that the replays of one graph take together


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

    On CUDA a round ends when the device is done, and ``device_seconds`` in the row is what a call takes in the replay
    of a graph of up to 20, without the host's part (None where ``run`` cannot be captured).

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
    if DEVICE.type == "cuda" and seconds:
        device = replayed(run, arguments, seconds)
        benchmark.extra_info["device_seconds"] = device and float(f"{device:.4g}")
        seconds = device or seconds
    if moved and seconds:
        benchmark.extra_info.update(moved=moved, copy_gbs=round(copy_rate(DEVICE) / 1e9, 1))
        benchmark.extra_info["copy_share"] = round(moved / seconds / copy_rate(DEVICE), 3)
    if flops and seconds:
        rate = matrix_rate(DEVICE)
        share = round(flops / seconds / rate, 4)
        benchmark.extra_info.update(flops=flops, matrix_gflops=round(rate / 1e9), matrix_share=share)
    return result


def replayed(run: Callable, arguments: tuple, seconds: float) -> float | None:
    """Seconds of a call in a replayed CUDA graph, or None where ``run`` cannot be captured; a call takes the host about
    ``seconds``."""
    calls = max(1, min(_CALLS, int(_SECONDS / _REPLAYS / seconds)))
    replays = max(5, min(_REPLAYS, int(_SECONDS / calls / seconds)))
    stream = torch.cuda.Stream()
    graph, start, end = torch.cuda.CUDAGraph(), *(torch.cuda.Event(enable_timing=True) for _ in range(2))
    with torch.cuda.stream(stream), ObstacleFinder() as finder:
        run(*arguments)
    stream.synchronize()
    if finder.obstacle:
        return None
    try:
        with torch.cuda.graph(graph, stream=stream):
            for _ in range(calls):
                run(*arguments)
    except RuntimeError:
        torch.cuda.synchronize()
        return None
    taken = []
    for _ in range(replays):
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        taken.append(start.elapsed_time(end) / 1e3 / calls)
    return statistics.median(taken[replays // 5 :])  # the first ones warm up
