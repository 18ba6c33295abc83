"""The rates of the machine, which times are held against."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import cache

import torch


def full_float32() -> None:
    """Make "fp32" float32 on a GPU too: PyTorch lets convolutions round to TF32, ten bits, unless told not to,
    and two ways that round in different places agree to three digits only."""
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False


def synchronize(device: torch.device) -> None:
    """Wait until a GPU has done all it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@cache
def copy_rate(device: torch.device) -> float:
    """Bytes read and written a second by a copy that no cache holds; the best of some rounds."""
    size = 1 << (30 if device.type == "cuda" else 28)
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * size / _best(device, lambda: target.copy_(source))


def matrix_rate(device: torch.device, dtype: torch.dtype = torch.float32) -> float:
    """Floating point operations a second of torch's own product at a size of ViT-B's, the best of some rounds."""
    width, rows = 768, 1576 * (8 if device.type == "cuda" else 1)  # eight views there, all 64 at once on a GPU
    x = torch.randn(rows, width, device=device, dtype=dtype)
    weight = torch.randn(4 * width, width, device=device, dtype=dtype)
    return 8 * rows * width**2 / _best(device, lambda: x @ weight.t())


def _best(device: torch.device, run: Callable, rounds: int = 15) -> float:
    best = float("inf")
    calls = 20 if device.type == "cuda" else 1  # together, or the host's part of one would count
    for _ in range(rounds):
        synchronize(device)
        started = time.perf_counter()
        for _ in range(calls):
            run()
        synchronize(device)
        best = min(best, (time.perf_counter() - started) / calls)
    return best
