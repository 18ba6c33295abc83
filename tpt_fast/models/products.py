"""Which product runs a tower's layers on this CPU, torch's or our own: measured once a machine and kept.

Neither is the faster one everywhere: it depends on the CPU, on its vectors, on the release of torch and its libraries
and on the number of threads. So both take turns at two layers of a tower, for a fraction of a second, and the times are
kept beside the built kernels, where every later process with the same of these reads them: one machine, one answer.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import time
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Tensor, nn

from .._files import atomic_write
from .._machine import cpu_identity, cpu_name
from .._modes import plain_modes
from ..extension import cache as builds
from ..extension import load
from ..ops._types import accumulation_dtype
from ..ops.bias_act import bias_act_
from ..ops.linear import DTYPES, linear, panels

MARGIN = 0.95  # ours has to take less than this share of torch's time, or the choice would be one of noise
WORTH = 0.8  # bfloat16 has to take less than this share of float32's time, or its rounding is for nothing
_WIDTH, _ROWS = 512, 384  # of a tower; rows for each thread
_SECONDS, _LEAST, _MOST = 0.3, 3, 12  # of turns, and how many of them


@dataclass(frozen=True)
class Measured:
    """Seconds of two layers of a tower: by :func:`~tpt_fast.ops.linear.linear`, and by torch."""

    own: float
    torch: float

    @property
    def own_is_faster(self) -> bool:
        """By more than noise."""
        return self.own < MARGIN * self.torch


def own_is_faster(dtype: torch.dtype) -> bool:
    """Whether our own product is to run layers with weights of ``dtype`` on this CPU.

    ``TPT_FAST_PRODUCT`` ("own" or "torch") decides it without measuring. Where there are no kernels it is torch's.

    Raises:
        ValueError: ``TPT_FAST_PRODUCT`` is something else.
    """
    choice = _choice()
    if dtype not in DTYPES or load.ensure().name != "native":
        return False
    return choice == "own" if choice else measured(dtype).own_is_faster


def _choice() -> str | None:
    """``TPT_FAST_PRODUCT``; None where it leaves it to the times."""
    choice = os.environ.get("TPT_FAST_PRODUCT") or "auto"
    if choice not in {"auto", "own", "torch"}:
        raise ValueError(f"TPT_FAST_PRODUCT: expected auto, own or torch, got {choice!r}")
    return None if choice == "auto" else choice


def fastest_precision(device: torch.device) -> str:
    """What ``precision="auto"`` means on ``device``: "bf16" on a CPU whose layers take less than :data:`WORTH` of the
    time in it, "fp32" otherwise."""
    if device.type != "cpu":
        return "fp32"

    def seconds(dtype: torch.dtype) -> float:
        times = measured(dtype)
        return times.own if own_is_faster(dtype) else times.torch

    return "bf16" if seconds(torch.bfloat16) < WORTH * seconds(torch.float32) else "fp32"


def described(dtype: torch.dtype) -> str:
    """Whose product runs layers of ``dtype``, and why."""
    name = "tpt_fast's" if own_is_faster(dtype) else "torch's"
    if choice := _choice():
        return f"{name} (TPT_FAST_PRODUCT={choice})"
    times = measured(dtype)
    return f"{name} (two layers take {1e3 * times.own:.1f} ms by ours, {1e3 * times.torch:.1f} ms by torch's)"


def measured(dtype: torch.dtype) -> Measured:
    """What was measured on this machine with as many threads as now; measures where nothing is kept yet."""
    return _measured(dtype, torch.get_num_threads())


@cache
def _measured(dtype: torch.dtype, threads: int) -> Measured:
    about = _about(dtype, threads)
    try:
        from filelock import FileLock

        digest = hashlib.sha256(json.dumps(about).encode()).hexdigest()[:16]
        file = builds.folder() / f"product-{digest}.json"
        if (kept := _read(file)) is not None:
            return kept
        builds.make(file.parent)
        with FileLock(f"{file}.lock", mode=0o664 if builds.is_shared() else 0o644):  # others wait for its answer
            if (kept := _read(file)) is None:
                kept = measure(dtype)
                with atomic_write(file) as aside:
                    aside.write_text(json.dumps({**asdict(kept), "about": about}, indent=1) + "\n")
            return kept
    except (OSError, ImportError, load.BuildError):  # nowhere to keep it: for this process alone
        return measure(dtype)


def _about(dtype: torch.dtype, threads: int) -> dict[str, str | int]:
    """All that the times depend on."""
    path = load.ensure().path
    record = path and builds.read_record(path.parent)
    limits = "ATEN_CPU_CAPABILITY", "MKL_ENABLE_INSTRUCTIONS", "ONEDNN_MAX_CPU_ISA"
    return {
        "type": str(dtype),
        "cpu": cpu_name(),
        "instructions": hashlib.sha256(cpu_identity().encode()).hexdigest(),
        "threads": threads,
        "torch": torch.__version__,
        "limits": " ".join(os.environ.get(name, "") for name in limits),
        "kernels": record["library"]["sha256"] if record else str(path),
    }


def _read(file: Path) -> Measured | None:
    """What is kept in ``file``, if it can be."""
    try:
        kept = json.loads(file.read_text())
        times = Measured(float(kept["own"]), float(kept["torch"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return times if all(0 < each < math.inf for each in (times.own, times.torch)) else None


@plain_modes
@torch.no_grad()
def measure(dtype: torch.dtype) -> Measured:
    """The least of some turns each: what else a machine does only adds to a time."""
    noise = torch.Generator().manual_seed(0)

    def some(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.randn(*shape, generator=noise, device="cpu", dtype=torch.float32).to(dtype)

    hidden = 4 * _WIDTH
    x, up, down = some(_ROWS * torch.get_num_threads(), _WIDTH), some(hidden, _WIDTH), some(_WIDTH, hidden)
    bias, laid_out = some(hidden, dtype=accumulation_dtype(dtype)), (panels(up), panels(down))

    def ours() -> None:
        active = linear(x, laid_out[0], bias, width=hidden, activation="gelu")
        linear(active, laid_out[1], width=_WIDTH)

    def theirs() -> None:
        nn.functional.linear(bias_act_(nn.functional.linear(x, up), bias, "gelu"), down)

    times: dict[str, list[float]] = {"own": [], "torch": []}
    began = time.perf_counter()
    for turn in range(1 + _MOST):
        for name, run in (("own", ours), ("torch", theirs)):
            started = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - started)
        if turn >= _LEAST and time.perf_counter() - began > _SECONDS:
            break
    return Measured(min(times["own"][1:]), min(times["torch"][1:]))  # the first turn warms up
