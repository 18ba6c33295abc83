"""Rows of results: one JSON object a line, with the machine, the versions and the quantiles in each."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from collections.abc import Iterable
from datetime import datetime, timezone
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from .._files import atomic_write, locked
from .._machine import cpu_flags, cpu_name

Row = dict[str, Any]

#: A row replaces another that has the same of all these.
KEY = ("op", "case", "backend", "cpu", "threads", "gpu")


@cache
def machine(device: str | None = None) -> Row:
    """What the figures were measured on; ``gpu`` is None where ``device`` (default: cuda if there is a GPU) is none."""
    import PIL
    import torch

    import tpt_fast

    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    gpu = torch.cuda.get_device_name(place) if place.type == "cuda" else None
    wide = " with AVX-512" if "avx512f" in cpu_flags() else ""  # names such as "AMD EPYC" do not tell
    return {
        "cpu": f"{cpu_name()}{wide}, {len(os.sched_getaffinity(0))} cores",
        "threads": torch.get_num_threads(),
        "gpu": gpu,
        "torch": torch.__version__,
        "cuda": torch.version.cuda if gpu else None,
        "pillow": PIL.__version__,
        "python": platform.python_version(),
        "tpt_fast": tpt_fast.__version__,
        "commit": _commit(),
    }


def _commit() -> str | None:
    """Of the checkout that runs; None for an installed package, which may lie in a repository of its user's."""
    root = Path(__file__).parents[2]
    if not (root / "csrc").is_dir():
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=10"]
    try:
        return subprocess.run(command, capture_output=True, text=True).stdout.strip() or None
    except OSError:  # no git
        return None


def row(op: str, case: str, backend: str, seconds: Iterable[float], *, device: str | None = None, **extra: Any) -> Row:
    """One row.

    Args:
        op: the op's stem, or "tune" for whole images.
        case: sizes, e.g. "64x1000".
        backend: what was timed: "tpt_fast" or the peer's name.
        seconds: every measured time.
        device: see :func:`machine`.
        extra: anything else worth keeping, such as the peak memory.
    """
    seconds = np.asarray(seconds)
    quantiles = np.quantile(seconds, [0, 0.2, 0.5, 0.8, 1])
    times = {name: digits(value) for name, value in zip(("min", "q20", "median", "q80", "max"), quantiles, strict=True)}
    named = {"op": op, "case": case, "backend": backend}
    when = datetime.now(timezone.utc).strftime("%Y-%m-%d")
    return {**named, **times, "rounds": len(seconds), **extra, **machine(device), "date": when}


def digits(value: float) -> float:
    """Four significant digits: what a measurement can claim at most."""
    return float(f"{value:.4g}")


def duration(seconds: float) -> str:
    """Three significant digits with a unit."""
    for unit, scale in (("s", 1), ("ms", 1e3), ("µs", 1e6)):
        if seconds * scale >= 1:
            return f"{seconds * scale:.3g} {unit}"
    return f"{seconds * 1e9:.3g} ns"


def add_ratios(rows: list[Row]) -> None:
    """How many times longer than tpt_fast each backend of one case took, if tpt_fast is among them."""
    ours = next((row["median"] for row in rows if row["backend"] == "tpt_fast"), None)
    if ours:
        for row in rows:
            row["ratio"] = round(row["median"] / ours, 2)


def read(path: Path) -> list[Row]:
    """The rows in ``path``, none if there is no such file.

    Raises:
        OSError: it cannot be read.
        ValueError: it holds something else than rows, naming the line.
    """
    rows = []
    for number, line in enumerate(path.read_text("utf-8").splitlines() if path.exists() else [], 1):
        try:
            found = json.loads(line)
        except json.JSONDecodeError:
            found = None
        if not isinstance(found, dict):
            raise ValueError(f"{path}: expected a JSON object on line {number}, got {line[:40]!r}")
        rows.append(found)
    return rows


def write(path: Path, rows: Iterable[Row]) -> None:
    """Replace what ``path`` says of the same cases, backends and machine, and keep the rest; see :func:`read`.

    Several processes may write to one file.
    """

    def key(row: Row) -> tuple:
        return tuple(row.get(name) for name in KEY)

    new = {key(row): row for row in rows}
    path.parent.mkdir(parents=True, exist_ok=True)
    with locked(path), atomic_write(path) as aside:
        kept = [row for row in read(path) if key(row) not in new]
        aside.write_text("".join(json.dumps(row) + "\n" for row in [*kept, *new.values()]), "utf-8")
