"""How much memory the text tower may use, and how it divides its rows by that."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from .._machine import free_bytes

_CGROUP = Path("/sys/fs/cgroup")
_UNKNOWN = 4 << 30  # assumed where the system does not tell

# Rows a chunk: on the CPU few enough that a block's widest rows stay near the last cache; on a GPU enough to fill it.
ROWS_AT_ONCE = {"cpu": 1024, "cuda": 32768}
# Activations beside which the weights may be laid out once more for our own product: for more of them the memory is
# needed. With 1000 classes of ViT-B/16 the text tower stays under 1.5 GB so.
KEPT_BESIDE_LAYOUT = 768 << 20
KEPT_BYTES = 2 << 30  # the most one tape may keep on the CPU; further chunks are computed again in the backward pass


@dataclass(frozen=True)
class Plan:
    """What fits of a packed tower."""

    free: int  #: bytes that can still be allocated
    rows_at_once: int  #: rows that pass through the tower together
    row_bytes: int  #: what the backward pass needs of one row
    kept_bytes: int  #: the most that is kept for the backward pass; the rest is computed again


def plan(device: torch.device, width: int, depth: int, expansion: int, itemsize: int) -> Plan:
    """For a tower of ``depth`` blocks whose MLPs are ``expansion`` times as wide as its rows."""
    free = free_bytes(device)
    row_bytes = (5 + expansion) * width * depth * itemsize
    working = (8 + 2 * expansion) * width * itemsize + row_bytes
    rows = max(1, min(ROWS_AT_ONCE[device.type], free // 4 // working))
    return Plan(free, rows, row_bytes, free // 3 if device.type == "cuda" else min(free // 3, KEPT_BYTES))
