"""What the machine says of itself, all of it read here: processors, memory that is free, memory of this process.

Imports torch only where a GPU is asked: the build, which setup.py runs too, asks for the processor.
"""

from __future__ import annotations

import ctypes
import platform
import re
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

_PROC, _CGROUP = Path("/proc"), Path("/sys/fs/cgroup")
_UNKNOWN = 4 << 30  # bytes assumed to be free where the system does not tell


def cpu_name() -> str:
    """The processor's name, as its maker gives it; the architecture's where that cannot be read."""
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", (_PROC / "cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return found[1].strip() if found else platform.processor() or platform.machine()


def cpu_identity() -> str:
    """Name and instruction sets: code compiled for this processor must not be found by another one that shares a cache
    (a home folder on a cluster)."""
    try:
        text = (_PROC / "cpuinfo").read_text()
    except OSError:
        return platform.processor()
    return "".join(sorted(set(re.findall(r"^(?:flags|Features|model name)\s*:.*$", text, re.MULTILINE))))


def cpu_flags() -> set[str]:
    """Instruction sets of the processor by the kernel's names without underscores, e.g. ``avx512bf16``; empty where the
    system does not tell."""
    try:
        found = re.search(r"^(?:flags|Features)\s*:(.*)$", (_PROC / "cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    listed = found[1].split() if found else []
    also = {"pni": "sse3", "bmi1": "bmi", "abm": "lzcnt"}  # compilers have other names for these
    return {also.get(name, name.replace("_", "")) for name in listed}


def free_host_bytes() -> int | None:
    """Bytes that can still be allocated: the minimum of the system's and the container's; None where neither tells."""
    limits = []
    try:
        limits.append(_kilobytes("meminfo", "MemAvailable"))
        limit = (_CGROUP / "memory.max").read_text().strip()
        if limit != "max":
            used = int((_CGROUP / "memory.current").read_text())
            cached = re.search(r"^inactive_file (\d+)$", (_CGROUP / "memory.stat").read_text(), re.MULTILINE)
            dropped = int(cached[1]) if cached else 0  # files that were read are dropped where memory is short
            limits.append(int(limit) - used + dropped)
    except (OSError, ValueError):
        pass
    return max(0, min(limits)) if limits else None


def free_bytes(device: torch.device) -> int:
    """Bytes that can still be allocated on ``device``."""
    if device.type == "cuda":
        import torch

        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    free = free_host_bytes()
    return _UNKNOWN if free is None else free


def resident_bytes() -> int:
    """Memory of this process that is in RAM.

    Raises:
        OSError: the system does not tell.
    """
    return _kilobytes("self/status", "VmRSS")


def peak_resident_bytes() -> int:
    """The most that :func:`resident_bytes` has been since :func:`reset_peak`; OSError likewise."""
    return _kilobytes("self/status", "VmHWM")


def reset_peak() -> None:
    """Let :func:`peak_resident_bytes` start anew; OSError where the system does not allow it."""
    (_PROC / "self/clear_refs").write_text("5")


def give_back() -> None:
    """What was freed goes back to the system, as far as the C library can be asked for that."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's
    if trim is not None:
        trim(0)


def _kilobytes(file: str, name: str) -> int:
    found = re.search(rf"^{name}:\s+(\d+) kB", (_PROC / file).read_text(), re.MULTILINE)
    if found is None:
        raise OSError(f"{_PROC / file} has no {name}")
    return 1024 * int(found[1])
