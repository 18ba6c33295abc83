"""Benchmark rows: one JSON object a line, with the machine, the versions and the quantiles in each.

``pytest benchmarks --rows`` appends to ``benchmarks/results/``; without it nothing is kept.
"""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
from collections.abc import Callable
from datetime import datetime, timezone
from functools import cache
from pathlib import Path

import numpy as np

RESULTS = Path(__file__).parent / "results"


@cache
def machine() -> dict:
    """What the figures were measured on."""
    import PIL
    import torch

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "cpu": _cpu_name(),
        "threads": torch.get_num_threads(),
        "gpu": gpu,
        "torch": torch.__version__,
        "cuda": torch.version.cuda if gpu else None,
        "pillow": PIL.__version__,
        "python": platform.python_version(),
        "commit": _commit(),
    }


def _cpu_name() -> str:
    try:
        name = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())[1]
    except (OSError, TypeError):
        name = platform.processor() or platform.machine()
    return f"{name}, {len(os.sched_getaffinity(0))} cores"


def _commit() -> str:
    command = ["git", "-C", str(RESULTS.parent), "describe", "--always", "--dirty", "--abbrev=10"]
    result = subprocess.run(command, capture_output=True, text=True)
    return result.stdout.strip() or "unknown"


def row(op: str, case: str, backend: str, seconds, **extra) -> dict:
    """One row.

    Args:
        op: the op's stem, or "tune" for whole images.
        case: sizes, e.g. "64x1000".
        backend: what was timed: "tpt_fast" or the peer's name.
        seconds: every measured time.
        extra: anything else worth keeping, such as a ratio to a peer of the same run.
    """
    low, q20, median, q80, high = np.quantile(np.asarray(seconds), [0, 0.2, 0.5, 0.8, 1]).tolist()
    times = {"min": low, "q20": q20, "median": median, "q80": q80, "max": high, "rounds": len(seconds)}
    times = {name: float(f"{value:.4g}") for name, value in times.items()}
    when = datetime.now(timezone.utc).strftime("%Y-%m-%d")
    return {"op": op, "case": case, "backend": backend, **times, **extra, **machine(), "date": when}


def read(op: str) -> list[dict]:
    """The rows kept of ``op``, none if there is no file."""
    path = RESULTS / f"{op}.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def write(op: str, rows: list[dict]) -> Path:
    """Replace what ``results/<op>.jsonl`` says of the same case, backend and machine, and keep the rest."""
    path = RESULTS / f"{op}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)

    def key(r):
        return tuple(r.get(name) for name in ("case", "backend", "cpu", "threads", "gpu"))

    new = {key(r): r for r in rows}
    kept = [r for r in read(op) if key(r) not in new]
    aside = path.with_suffix(".tmp")
    aside.write_text("".join(json.dumps(r) + "\n" for r in [*kept, *new.values()]))
    os.replace(aside, path)
    return path


class Peak:
    """The most bytes in use above what was in use at first: on the GPU if there is one, else of this process."""

    def __init__(self) -> None:
        import torch

        self._cuda = torch.cuda if torch.cuda.is_available() else None
        self._base = self._cuda.memory_allocated() if self._cuda else _resident("VmRSS")
        self.bytes = 0

    def of(self, run: Callable):
        """Call ``run`` and return what it returns; :attr:`bytes` holds the highest peak of all calls."""
        if self._cuda:
            self._cuda.reset_peak_memory_stats()
        else:
            Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
        result = run()
        peak = self._cuda.max_memory_allocated() if self._cuda else _resident("VmHWM")
        self.bytes = max(self.bytes, peak - self._base)
        return result


def _resident(name: str) -> int:
    return 1024 * int(re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])
