"""Compile ``csrc/`` and ``python/`` into one shared library that torch loads.

Imported by ``setup.py`` too (ahead-of-time builds), so it imports nothing of the package but its neighbour
``_toolkit`` and torch only inside functions.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

try:
    from . import _toolkit
except ImportError:  # setup.py loads this file by itself
    import _toolkit

LIBRARY = "tpt_fast.so"
TORCH_FLOOR = (2, 10)
# The oldest torch whose stable ABI the library uses: it loads on that one and on every later one.
TORCH_TARGET = f"0x{TORCH_FLOOR[0]:02x}{TORCH_FLOOR[1]:02x}000000000000"


def source_root() -> Path:
    """The folder that holds ``csrc/`` and ``python/``: inside the installed package, or beside it in a checkout."""
    package = Path(__file__).resolve().parent
    packaged = package / "_sources"
    return packaged if packaged.is_dir() else package.parent


@dataclass(frozen=True)
class Plan:
    """Everything that decides what the compilers will produce; :meth:`key` names it."""

    compiler: _toolkit.Tool
    cxx_flags: tuple[str, ...]
    link_flags: tuple[str, ...]
    nvcc: str | None
    nvcc_flags: tuple[str, ...]
    sources: tuple[str, ...]
    identity: str

    def key(self) -> str:
        """16 hexadecimal digits that change with the package, torch, CUDA, compilers, flags, CPU or any source."""
        digest = hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode())
        root = source_root()
        for folder in ("csrc", "python"):
            for file in sorted((root / folder).iterdir()):
                if file.suffix in {".h", ".cuh", ".cpp", ".cu"}:
                    digest.update(file.name.encode() + file.read_bytes())
        return digest.hexdigest()[:16]


def _cpu_identity() -> str:
    """-march=native code must not be found by another CPU that shares the cache (a home folder on a cluster)."""
    try:
        text = Path("/proc/cpuinfo").read_text()
        return "".join(sorted(set(re.findall(r"^(?:flags|Features|model name)\s*:.*$", text, re.MULTILINE))))
    except OSError:
        return platform.processor()


def wants_cuda() -> bool:
    """Whether to build the CUDA kernels: ``TPT_FAST_CUDA`` (0 or 1) if set, else whether torch sees a GPU."""
    import torch

    choice = os.environ.get("TPT_FAST_CUDA")
    return choice == "1" if choice in {"0", "1"} else torch.version.cuda is not None and torch.cuda.is_available()


def plan(with_cuda: bool | None = None) -> Plan:
    """What building here and now would do.

    Raises:
        BuildError: torch is too old, no compiler, or CUDA is wanted and no fitting toolkit is found.
    """
    import torch

    version = tuple(map(int, re.findall(r"\d+", torch.__version__)[:2]))
    if version < TORCH_FLOOR:
        raise _toolkit.BuildError(f"torch {torch.__version__} is too old: the kernels need 2.10 or later.")
    compiler = _toolkit.cxx()
    torch_root = Path(torch.__file__).parent
    root = source_root()
    sources = sorted([*(root / "csrc").glob("*.cpp"), *(root / "python").glob("*.cpp")])
    march = "-mcpu=native" if platform.machine() in {"arm64", "aarch64"} else "-march=native"
    cxx_flags = [
        *("-std=c++20", "-O3", march, "-fPIC", "-fopenmp-simd", "-fno-math-errno", "-fno-trapping-math"),
        *("-fvisibility=hidden", "-DNDEBUG", "-Wall"),
        *(f"-DTORCH_TARGET_VERSION={TORCH_TARGET}", f"-I{torch_root / 'include'}"),
    ]
    libraries = torch_root / "lib"
    link_flags = ["-shared", f"-L{libraries}", "-ltorch_cpu", "-ltorch", "-lc10"]
    nvcc, nvcc_flags, cuda_version = None, [], None
    if wants_cuda() if with_cuda is None else with_cuda:
        toolkit = _find_cuda(torch.version.cuda)
        nvcc, cuda_version = toolkit.nvcc, toolkit.version
        sources += sorted((root / "csrc").glob("*.cu"))
        cxx_flags += ["-DTPT_FAST_CUDA", "-DUSE_CUDA", f"-isystem{toolkit.include}"]
        nvcc_flags = ["-std=c++17", "-O3", "-DTPT_FAST_CUDA", "-Xcompiler=-fPIC,-fvisibility=hidden", "-lineinfo"]
        nvcc_flags += [f"-ccbin={compiler.path}", *map(_gencode, _toolkit.architectures())]
        link_flags += ["-ltorch_cuda", f"-L{toolkit.library}", "-lcudart"]
    identity = f"{torch.__version__} {cuda_version} {sys.platform} {_cpu_identity()}"
    return Plan(
        compiler, tuple(cxx_flags), tuple(link_flags), nvcc, tuple(nvcc_flags), tuple(map(str, sources)), identity
    )


def _find_cuda(torch_cuda: str | None) -> _toolkit.Cuda:
    if torch_cuda is None:
        raise _toolkit.BuildError("CUDA kernels are wanted, but this torch is a CPU build. Install a CUDA build of torch.")
    toolkit = _toolkit.cuda()
    if toolkit is None:
        raise _toolkit.BuildError(
            "no CUDA toolkit: looked for nvcc in CUDA_HOME, on the PATH, in /usr/local/cuda and among pip packages. "
            f"Install CUDA {torch_cuda}, or `pip install nvidia-cuda-nvcc nvidia-cuda-runtime nvidia-cuda-cccl`."
        )
    if toolkit.version < _toolkit.MIN_NVCC or toolkit.version[0] != int(torch_cuda.partition(".")[0]):
        found = ".".join(map(str, toolkit.version))
        raise _toolkit.BuildError(
            f"torch is built for CUDA {torch_cuda}, but {toolkit.nvcc} is CUDA {found}: the major versions must agree. "
            f"Point CUDA_HOME at a CUDA {torch_cuda} toolkit."
        )
    return toolkit


def _gencode(architecture: str) -> str:
    number = re.sub(r"[^0-9]", "", architecture.partition("+")[0])
    suffix = "a" if architecture.partition("+")[0].endswith("a") else ""
    codes = f"sm_{number}{suffix}" + (f",compute_{number}{suffix}" if architecture.endswith("+PTX") else "")
    return f"-gencode=arch=compute_{number}{suffix},code=[{codes}]"


def _jobs() -> int:
    """Compilers at once: the cores this process may use, at 2 GB each of the memory that is free, or MAX_JOBS."""
    if limit := os.environ.get("MAX_JOBS"):
        return max(1, int(limit))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        free = int(re.search(r"MemAvailable:\s+(\d+)", Path("/proc/meminfo").read_text())[1]) // (2 << 20)
    except (OSError, TypeError):
        free = cores
    return max(1, min(cores, free))


def _quote(text: str) -> str:
    return text.replace("$", "$$").replace(":", "$:").replace(" ", "$ ")


def _ninja_file(plan: Plan) -> str:
    flags = " ".join(plan.cxx_flags)
    lines = [
        "rule cxx",
        f"  command = {plan.compiler.path} -MMD -MF $out.d {flags} -c $in -o $out",
        "  depfile = $out.d",
        "rule nvcc",
        f"  command = {plan.nvcc} {' '.join(plan.nvcc_flags)} -c $in -o $out",
        "rule link",
        f"  command = {plan.compiler.path} $in -o $out {' '.join(plan.link_flags)}",
    ]
    objects = []
    for source in plan.sources:
        path = Path(source)
        objects.append(f"{path.parent.name}-{path.name}.o")
        lines.append(f"build {objects[-1]}: {'nvcc' if path.suffix == '.cu' else 'cxx'} {_quote(source)}")
    return "\n".join([*lines, f"build {LIBRARY}: link {' '.join(objects)}", ""])


def build(plan: Plan, folder: Path) -> Path:
    """Compile ``plan`` in ``folder`` (which must exist) and return the library's path.

    Beside the library stands ``build.json``: what it was built from, with what, in how many seconds.

    Raises:
        BuildError: a compiler failed; the message ends with its output.
    """
    started = time.perf_counter()
    (folder / "build.ninja").write_text(_ninja_file(plan))
    command = [sys.executable, "-m", "ninja", "-C", str(folder), f"-j{_jobs()}"]
    result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if result.returncode:
        raise _toolkit.BuildError(f"the compilation failed. Its last lines:\n{result.stdout[-4000:]}")
    for rest in [*folder.glob("*.o"), *folder.glob("*.d"), *folder.glob(".ninja*")]:
        rest.unlink()
    record = {"key": plan.key(), "seconds": round(time.perf_counter() - started, 1), **asdict(plan)}
    (folder / "build.json").write_text(json.dumps(record, indent=1))
    return folder / LIBRARY
