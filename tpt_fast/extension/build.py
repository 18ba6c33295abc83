"""Compile ``csrc/`` and ``python/`` into two shared libraries that torch loads: the CPU's kernels and CUDA's.

Two, so that neither waits for the other, nor fails with it. Imported by ``setup.py`` too (ahead-of-time builds), so it
imports nothing of the package but its neighbours and torch only inside functions.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .._machine import cpu_flags, cpu_identity, free_host_bytes
from . import cache, toolkit

LIBRARIES = {"cpu": "tpt_fast.so", "cuda": "tpt_fast_cuda.so"}  # the two halves
TORCH_FLOOR = (2, 10)
# The oldest torch whose stable ABI the library uses: it loads on that one and on every later one.
TORCH_TARGET = f"0x{TORCH_FLOOR[0]:02x}{TORCH_FLOOR[1]:02x}000000000000"


def source_root() -> Path:
    """The folder that holds ``csrc/`` and ``python/``: inside the installed package, or beside it in a checkout."""
    package = Path(__file__).resolve().parent.parent
    packaged = package / "_sources"
    return packaged if packaged.is_dir() else package.parent


@dataclass(frozen=True)
class Plan:
    """Everything that decides what the compilers will produce; :meth:`key` names it."""

    library: str
    compiler: toolkit.Tool
    march: tuple[str, ...]
    cxx_flags: tuple[str, ...]
    link_flags: tuple[str, ...]
    nvcc: str | None
    nvcc_flags: tuple[str, ...]
    sources: tuple[str, ...]
    includes: tuple[str, ...]
    libraries: tuple[str, ...]
    identity: str

    def key(self) -> str:
        """16 hexadecimal digits that change with torch, CUDA, compilers, flags, CPU or any source.

        Not with the places of the package and of torch: environments with the same versions share one build.
        """
        places = {"sources", "includes", "libraries", "nvcc"}
        chosen = {name: value for name, value in asdict(self).items() if name not in places}
        digest = hashlib.sha256(json.dumps(chosen, sort_keys=True).encode())
        root = source_root()
        for folder in ("csrc", "python"):
            for file in sorted((root / folder).iterdir()):
                if file.suffix in {".h", ".cuh"} or str(file) in self.sources:
                    digest.update(f"{folder}/{file.name} {file.stat().st_size} ".encode() + file.read_bytes())
        return digest.hexdigest()[:16]


def cuda_choice() -> bool | None:
    """``TPT_FAST_CUDA``: False for no CUDA kernels, True for them in any case, None for those of a GPU that is used.

    Raises:
        ValueError: it is neither 0 nor 1.
    """
    choice = os.environ.get("TPT_FAST_CUDA")
    if choice not in {None, "", "0", "1"}:
        raise ValueError(f"TPT_FAST_CUDA: expected 0 or 1, got {choice!r}")
    return choice == "1" if choice else None


def _march() -> tuple[str, ...]:
    """The flag for the instruction sets to compile for: this CPU's, or ``TPT_FAST_MARCH``."""
    chosen = os.environ.get("TPT_FAST_MARCH") or "native"
    if not re.fullmatch(r"[\w.+-]+", chosen):
        raise toolkit.BuildError(f"TPT_FAST_MARCH: expected what -march takes, such as x86-64-v3, got {chosen!r}")
    return ("-mcpu=native" if chosen == "native" and _is_arm() else f"-march={chosen}",)


def _is_arm() -> bool:
    return platform.machine() in {"arm64", "aarch64"}


def plan(half: str = "cpu") -> Plan:
    """What building one half, "cpu" or "cuda", here and now would do.

    Raises:
        BuildError: torch is too old, no compiler, or no fitting CUDA toolkit or GPU for the half that needs them.
    """
    import torch

    version = tuple(map(int, re.findall(r"\d+", torch.__version__)[:2]))
    if version < TORCH_FLOOR:
        raise toolkit.BuildError(f"torch {torch.__version__} is too old: the kernels need 2.10 or later.")
    compiler = toolkit.cxx()
    torch_root, root = Path(torch.__file__).parent, source_root()
    cxx_flags = ["-std=c++20", "-O3", "-fPIC", "-fvisibility=hidden", "-DNDEBUG", "-Wall"]
    cxx_flags.append(f"-DTORCH_TARGET_VERSION={TORCH_TARGET}")
    link_flags = ["-shared", "-ltorch_cpu", "-ltorch", "-lc10"]
    includes, libraries = [str(torch_root / "include")], [str(torch_root / "lib")]
    nvcc, nvcc_flags = None, []
    march: tuple[str, ...] = ()
    if half == "cpu":
        sources = [*(root / "csrc").glob("*.cpp"), *(root / "python").glob("*.cpp")]
        march = _march()
        cxx_flags += [*march, "-fopenmp-simd", "-fno-math-errno", "-fno-trapping-math"]
        identity = cpu_identity()
    else:
        cuda = _find_cuda(torch.version.cuda)
        kernels = list((root / "csrc").glob("*.cu"))
        bindings = [root / "python" / f"{kernel.stem}.cpp" for kernel in kernels]
        sources = [*kernels, *filter(Path.exists, bindings)]
        nvcc = cuda.nvcc
        cxx_flags += ["-DTPT_FAST_CUDA", "-DUSE_CUDA"]
        nvcc_flags = ["-std=c++17", "-O3", "-DTPT_FAST_CUDA", "-Xcompiler=-fPIC,-fvisibility=hidden", "-lineinfo"]
        nvcc_flags += [f"-ccbin={compiler.program}", *(f"-Xcompiler={flag}" for flag in compiler.flags)]
        nvcc_flags += map(_gencode, toolkit.architectures())
        link_flags += ["-ltorch_cuda", f"-l:{cuda.runtime}"]
        includes.append(cuda.include)
        libraries.append(cuda.library)
        identity = f"{cuda.version} {platform.machine()}"
    return Plan(
        library=LIBRARIES[half],
        compiler=compiler,
        march=march,
        cxx_flags=tuple(cxx_flags),
        link_flags=tuple(link_flags),
        nvcc=nvcc,
        nvcc_flags=tuple(nvcc_flags),
        sources=tuple(map(str, sorted(sources))),
        includes=tuple(includes),
        libraries=tuple(libraries),
        identity=f"{torch.__version__} {sys.platform} {identity}",
    )


def _needs(plan: Plan) -> list[str]:
    """Instruction sets that the library may use, as :func:`tpt_fast._machine.cpu_flags` names them."""
    if not plan.march or (_is_arm() and plan.march != ("-mcpu=native",)):
        return []
    mine = cpu_flags()
    if _is_arm():
        return sorted(mine)
    sets = toolkit.instruction_sets(plan.compiler, plan.march)
    # What the compiler finds in this CPU but the kernel does not tell cannot be asked of another CPU either.
    return sorted(sets & mine if plan.march == ("-march=native",) else sets)


def missing_sets(record: dict[str, Any]) -> list[str]:
    """Instruction sets that the build of ``record`` needs and this CPU does not have, or does not tell of."""
    mine = cpu_flags()
    return sorted(set(record.get("needs", ())) - mine) if mine else []


def _find_cuda(torch_cuda: str | None) -> toolkit.Cuda:
    if torch_cuda is None:
        raise toolkit.BuildError(
            "CUDA kernels are wanted, but this torch is a CPU build. Install a CUDA build of torch."
        )
    cuda = toolkit.cuda()
    if cuda is None:
        raise toolkit.BuildError(
            "no CUDA toolkit: looked for nvcc in CUDA_HOME, on the PATH, in /usr/local/cuda and among pip packages. "
            f"Install CUDA {torch_cuda}, or `pip install nvidia-cuda-nvcc nvidia-cuda-runtime nvidia-cuda-cccl`."
        )
    if cuda.version < toolkit.MIN_NVCC or cuda.version[0] != int(torch_cuda.partition(".")[0]):
        found = ".".join(map(str, cuda.version))
        raise toolkit.BuildError(
            f"torch is built for CUDA {torch_cuda}, but {cuda.nvcc} is CUDA {found}: the major versions must agree. "
            f"Point CUDA_HOME at a CUDA {torch_cuda} toolkit."
        )
    return cuda


def _gencode(architecture: str) -> str:
    number = re.sub(r"[^0-9]", "", architecture.partition("+")[0])
    suffix = "a" if architecture.partition("+")[0].endswith("a") else ""
    codes = f"sm_{number}{suffix}" + (f",compute_{number}{suffix}" if architecture.endswith("+PTX") else "")
    return f"-gencode=arch=compute_{number}{suffix},code=[{codes}]"


def _jobs() -> int:
    """Compilers at once: the cores this process may use, at 2 GB each of the memory that is free, or MAX_JOBS."""
    if limit := os.environ.get("MAX_JOBS"):
        if not limit.isdecimal():
            raise toolkit.BuildError(f"MAX_JOBS: expected a number, got {limit!r}")
        return max(1, int(limit))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    free = free_host_bytes()
    return max(1, cores if free is None else min(cores, free >> 31))


def _quote(text: str) -> str:
    """A path as a ninja build line wants it."""
    return re.sub(r"([$: ])", r"$\1", text)


def _words(*words: str) -> str:
    """Words of a command line, for the shell and for ninja."""
    return shlex.join(words).replace("$", "$$")


def _ninja_file(plan: Plan) -> str:
    cxx = [*plan.compiler.command, *plan.cxx_flags, *(f"-I{folder}" for folder in plan.includes)]
    link = [*plan.link_flags, *(f"-L{folder}" for folder in plan.libraries)]
    lines = [
        "rule cxx",
        f"  command = {_words(*cxx)} -c $in -o $out",
        "rule nvcc",
        f"  command = {_words(plan.nvcc or 'nvcc', *plan.nvcc_flags)} -c $in -o $out",
        "rule link",
        f"  command = {_words(*plan.compiler.command)} $in -o $out {_words(*link)}",
    ]
    objects = []
    for source in plan.sources:
        path = Path(source)
        objects.append(f"{path.parent.name}-{path.name}.o")
        lines.append(f"build {objects[-1]}: {'nvcc' if path.suffix == '.cu' else 'cxx'} {_quote(source)}")
    return "\n".join([*lines, f"build {plan.library}: link {' '.join(objects)}", ""])


def build(plan: Plan, folder: Path, progress: Callable[[int, int], None] | None = None) -> Path:
    """Compile ``plan`` in ``folder`` (which must exist) and return the library's path.

    Beside the library stands ``build.json``: its size and SHA-256, what it was built from, with what, in how many
    seconds, and which instruction sets it needs. No compiler is left running, whatever ends this.

    Args:
        progress: called with (files done, files in all) before the first and after each.

    Raises:
        BuildError: a compiler failed, and the message ends with its output; or ninja is missing.
    """
    started = time.perf_counter()
    (folder / "build.ninja").write_text(_ninja_file(plan))
    watched = [sys.executable, "-I", str(Path(__file__).with_name("watched.py"))]
    command = [*watched, toolkit.ninja(), "-C", str(folder), f"-j{_jobs()}"]
    if progress:
        progress(0, len(plan.sources) + 1)
    environment = {**os.environ, "NINJA_STATUS": "[%f/%t] "}
    lines: list[str] = []
    # In a session of its own, for a Ctrl-C of the terminal to reach this process alone, which then ends them in order.
    with subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        env=environment,
        start_new_session=True,
    ) as ninja:
        assert ninja.stdin is not None
        assert ninja.stdout is not None
        try:
            for line in ninja.stdout:
                counted = re.match(r"\[(\d+)/(\d+)\] ", line)
                if counted and progress:
                    progress(int(counted[1]), int(counted[2]))
                if not counted and not line.startswith("ninja: "):  # which is of no use in an error
                    lines.append(line)
        except BaseException:  # Ctrl-C first of all
            ninja.stdin.close()
            ninja.wait()
            raise
    if ninja.returncode:
        output = "".join(lines)[-4000:].strip() or "nothing"
        compiler = plan.compiler.version + (f" or {plan.nvcc}" if plan.nvcc else "")
        raise toolkit.BuildError(f"the compilation failed. {compiler} says:\n{output}")
    for rest in [*folder.glob("*.o"), *folder.glob(".ninja*")]:
        rest.unlink()
    library = folder / plan.library
    seconds = round(time.perf_counter() - started, 1)
    record: dict[str, Any] = {"key": plan.key(), "library": cache.digest(library), "needs": _needs(plan)}
    record |= {"seconds": seconds, "plan": asdict(plan)}
    (folder / cache.RECORD).write_text(json.dumps(record, indent=1))
    return library
