"""How much memory the text tower may use, and how it divides its rows by that."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import torch

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


def free_bytes(device: torch.device) -> int:
    """Bytes that can still be allocated: what CUDA reports; else the least of the system's and the container's."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    limits = []
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                limits.append(int(line.split()[1]) << 10)
        limit = (_CGROUP / "memory.max").read_text().strip()
        if limit != "max":
            used = int((_CGROUP / "memory.current").read_text())
            cached = re.search(r"^inactive_file (\d+)$", (_CGROUP / "memory.stat").read_text(), re.MULTILINE)
            limits.append(int(limit) - used + int(cached[1]))  # files that were read are dropped where memory is short
    except (OSError, ValueError, TypeError):
        pass
    return max(0, min(limits, default=_UNKNOWN))
