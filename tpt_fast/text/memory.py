"""How much memory the text tower may use."""

from __future__ import annotations

from pathlib import Path

import torch

_CGROUP = Path("/sys/fs/cgroup")
_UNKNOWN = 4 << 30  # assumed where the system does not tell


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
            limits.append(int(limit) - int((_CGROUP / "memory.current").read_text()))
    except (OSError, ValueError):
        pass
    return max(0, min(limits, default=_UNKNOWN))
