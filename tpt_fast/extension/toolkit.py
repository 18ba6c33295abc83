"""What this machine has to build with: a C++ compiler, a CUDA toolkit, GPUs."""

from __future__ import annotations

import functools
import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

MIN_NVCC = (12, 0)
DEFAULT_ARCHITECTURES = "8.0;8.6;8.9;9.0+PTX"


class BuildError(RuntimeError):
    """The extension cannot be built here; the message says what is missing and what to do."""


@dataclass(frozen=True)
class Tool:
    """A program and the version it reports."""

    path: str
    version: str


def _output(*command: str) -> str:
    """What the command prints; nothing where it cannot run."""
    try:
        result = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return result.stdout + result.stderr


@functools.cache
def cxx() -> Tool:
    """The C++ compiler: ``$CXX``, else the first of c++, g++ and clang++ on the PATH.

    Raises:
        BuildError: there is none.
    """
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
    for name in names:
        if path := shutil.which(name):
            return Tool(path, _output(path, "--version").partition("\n")[0])
    raise BuildError(
        f"no C++ compiler: looked for {', '.join(names)} on the PATH. Install one "
        "(Debian and Ubuntu: apt-get install g++; conda: conda install gxx) or set CXX to its path."
    )


@dataclass(frozen=True)
class Cuda:
    """A CUDA toolkit: its compiler, the folders of its headers and libraries, and the runtime library's file name."""

    nvcc: str
    version: tuple[int, int]
    root: str
    include: str
    library: str
    runtime: str


def _candidates() -> list[str]:
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    found = [str(Path(home, "bin", "nvcc")) for home in homes]
    found += filter(None, [shutil.which("nvcc"), "/usr/local/cuda/bin/nvcc"])
    spec = find_spec("nvidia")  # the pip packages nvidia-cuda-nvcc and nvidia-cuda-runtime
    for root in (spec.submodule_search_locations or []) if spec else []:
        found += map(str, sorted(Path(root).glob("cu*/bin/nvcc"), reverse=True))
    return [path for path in dict.fromkeys(found) if os.access(path, os.X_OK)]


@functools.cache
def cuda() -> Cuda | None:
    """The first usable CUDA toolkit, or None.

    ``nvcc`` on the PATH may be a wrapper script far from its toolkit, so nvcc itself is asked where its root is
    (``--dryrun`` prints it as TOP).
    """
    for nvcc in _candidates():
        dryrun = _output(nvcc, "--dryrun", "-x", "cu", os.devnull, "-o", os.devnull)
        top = re.search(r"^#\$ TOP=(.+)$", dryrun, re.MULTILINE)
        release = re.search(r"release (\d+)\.(\d+)", _output(nvcc, "--version"))
        if not top or not release:
            continue
        root = Path(top[1].strip()).resolve()
        for include in (root / "include", *root.glob("targets/*/include")):
            library = include.parent / ("lib64" if (include.parent / "lib64").exists() else "lib")
            runtimes = sorted(file.name for file in library.glob("libcudart.so*"))  # pip packages lack the plain name
            if (include / "cuda_runtime_api.h").exists() and runtimes:
                version = int(release[1]), int(release[2])
                return Cuda(nvcc, version, str(root), str(include), str(library), runtimes[0])
    return None


def architectures() -> list[str]:
    """CUDA architectures to compile for, e.g. ``["9.0"]``: those of the visible GPUs, else ``TORCH_CUDA_ARCH_LIST``,
    else the data-centre and consumer GPUs since Ampere. ``+PTX`` keeps the intermediate code of that one too."""
    import torch

    if torch.cuda.is_available():
        capabilities = {torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())}
        return [f"{major}.{minor}" for major, minor in sorted(capabilities)]
    listed = os.environ.get("TORCH_CUDA_ARCH_LIST") or DEFAULT_ARCHITECTURES
    names = [name for name in re.split(r"[;, ]+", listed) if name]
    for name in names:
        if not re.fullmatch(r"\d+\.\d+[a-f]?(\+PTX)?", name):
            raise BuildError(f"TORCH_CUDA_ARCH_LIST: expected numbers such as 8.0 or 9.0+PTX, got {name!r}")
    return names
