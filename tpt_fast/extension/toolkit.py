"""What this machine has to build with: a C++ compiler, ninja, a CUDA toolkit, GPUs."""

from __future__ import annotations

import functools
import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import dropwhile
from pathlib import Path

MIN_NVCC = (12, 0)
MIN_CAPABILITY = (7, 5)
DEFAULT_ARCHITECTURES = "7.5;8.0;8.6;8.9;9.0+PTX"


class BuildError(RuntimeError):
    """The extension cannot be built here; the message says what is missing and what to do."""


@dataclass(frozen=True)
class Tool:
    """A compiler: the words that call it (a launcher or flags may be among them), and the version it reports."""

    command: tuple[str, ...]
    version: str

    @property
    def program(self) -> str:
        """The compiler itself: the last word before the first flag."""
        return self.command[len(self.command) - len(self.flags) - 1]

    @property
    def flags(self) -> tuple[str, ...]:
        """What follows the compiler."""
        return tuple(dropwhile(lambda word: not word.startswith("-"), self.command))


def _output(*command: str) -> str:
    """What the command prints; nothing where it cannot run."""
    try:
        result = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return result.stdout + result.stderr


@functools.cache
def cxx() -> Tool:
    """The C++ compiler: ``$CXX``, split as a shell does, else the first of c++, g++ and clang++ on the PATH.

    Raises:
        BuildError: there is none.
    """
    try:
        commands = [shlex.split(os.environ.get("CXX", ""))]
    except ValueError as error:
        raise BuildError(f"CXX: expected words as in a shell, got {os.environ['CXX']!r} ({error})") from error
    if commands == [[]]:
        commands = [["c++"], ["g++"], ["clang++"]]
    for name, *rest in commands:
        if path := shutil.which(name):
            found = Tool((path, *rest), _output(path, *rest, "--version").partition("\n")[0])
            if rest and not shutil.which(found.program):
                commands = [[found.program]]  # there is a launcher, but not the compiler behind it
                break
            return found
    raise BuildError(
        f"no C++ compiler: looked for {', '.join(command[0] for command in commands)} on the PATH. Install one "
        "(Debian and Ubuntu: apt-get install g++; conda: conda install gxx) or set CXX to its path."
    )


# Instruction sets that compilers use unasked: GCC's and Clang's names (__AVX2__) in lower case without underscores.
_X86_SETS = frozenset(
    [
        "sse3",
        "ssse3",
        "sse41",
        "sse42",
        "sse4a",
        "popcnt",
        "lzcnt",
        "movbe",
        "bmi",
        "bmi2",
        "tbm",
        "f16c",
        "fma",
        "fma4",
        "xop",
        "avx",
        "avx2",
        "avxvnni",
        "avxifma",
        "avxvnniint8",
        "avxneconvert",
        "avx512f",
        "avx512cd",
        "avx512bw",
        "avx512dq",
        "avx512vl",
        "avx512ifma",
        "avx512vbmi",
        "avx512vbmi2",
        "avx512vnni",
        "avx512bitalg",
        "avx512vpopcntdq",
        "avx512vp2intersect",
        "avx512bf16",
        "avx512fp16",
        "gfni",
        "vaes",
        "vpclmulqdq",
        "amxtile",
        "amxint8",
        "amxbf16",
    ]
)


def instruction_sets(compiler: Tool, flags: Iterable[str]) -> set[str]:
    """Those beyond x86-64's first that code compiled with ``flags`` may need, e.g. ``{"avx2", "fma"}``."""
    macros = _output(*compiler.command, *flags, "-dM", "-E", "-x", "c++", os.devnull)
    names = re.findall(r"^#define __(\w+)__ 1$", macros, re.MULTILINE)
    return {name.lower().replace("_", "") for name in names} & _X86_SETS


def ninja() -> str:
    """Path of ninja, which runs the compilers: the pip package's, else one on the PATH.

    Raises:
        BuildError: there is neither.
    """
    try:
        from ninja import BIN_DIR
    except ImportError:
        BIN_DIR = ""
    path = shutil.which("ninja", path=BIN_DIR) if BIN_DIR else None
    path = path or shutil.which("ninja") or shutil.which("ninja-build")
    if path is None:
        raise BuildError("ninja is missing, which runs the compilers: pip install ninja")
    return path


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


def _known_capabilities() -> list[tuple[int, int]]:
    """Compute capabilities that nvcc compiles for; none where there is no nvcc or it does not say."""
    found = cuda()
    listed = _output(found.nvcc, "--list-gpu-arch") if found else ""
    return sorted(divmod(int(number), 10) for number in set(re.findall(r"\bcompute_(\d+)\b", listed)))


def _architecture(name: str, capability: tuple[int, int], known: list[tuple[int, int]]) -> str:
    """What to compile for the GPU ``name``, which is newer than nvcc if nvcc does not know it: then the intermediate
    code of the newest architecture that it does know, which the GPU's driver compiles the rest of the way."""
    number = f"sm_{capability[0]}{capability[1]}"
    if capability < MIN_CAPABILITY:
        raise BuildError(
            f"{name} ({number}) is too old for the CUDA kernels, which need compute capability 7.5 (Turing, such as a "
            "T4) or later. CUDA_VISIBLE_DEVICES hides a GPU from PyTorch; TPT_FAST_CUDA=0 silences this."
        )
    if not known or capability in known:
        return "{}.{}".format(*capability)
    older = [one for one in known if MIN_CAPABILITY <= one < capability]
    if not older:
        raise BuildError(
            f"nvcc no longer compiles for {name} ({number}): install an older CUDA toolkit of the same major version."
        )
    return "{}.{}+PTX".format(*older[-1])


def architectures() -> list[str]:
    """CUDA architectures to compile for, e.g. ``["9.0"]``: those of the visible GPUs, else ``TORCH_CUDA_ARCH_LIST``,
    else the data-centre and consumer GPUs since Turing. ``+PTX`` keeps the intermediate code of that one too.

    Raises:
        BuildError: a GPU is too old, or the list cannot be read.
    """
    import torch

    if torch.cuda.is_available():
        known = _known_capabilities()
        count = range(torch.cuda.device_count())
        gpus = {torch.cuda.get_device_capability(i): torch.cuda.get_device_name(i) for i in count}
        return list(dict.fromkeys(_architecture(gpus[capability], capability, known) for capability in sorted(gpus)))
    listed = os.environ.get("TORCH_CUDA_ARCH_LIST") or DEFAULT_ARCHITECTURES
    names = [name for name in re.split(r"[;, ]+", listed) if name]
    for name in names:
        if not re.fullmatch(r"\d+\.\d+[a-f]?(\+PTX)?", name):
            raise BuildError(f"TORCH_CUDA_ARCH_LIST: expected numbers such as 8.0 or 9.0+PTX, got {name!r}")
        if tuple(map(int, re.findall(r"\d+", name))) < MIN_CAPABILITY:
            raise BuildError(f"TORCH_CUDA_ARCH_LIST: expected 7.5 or later, got {name!r}")
    return names
