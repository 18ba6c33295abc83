"""Compile ``csrc/*.cu`` with the host compiler against the stand-in for CUDA, into a Python module."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

HERE = Path(__file__).resolve().parent
CSRC = HERE.parent.parent / "csrc"
FLAGS = ["-std=c++20", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Wno-unknown-pragmas", "-DTPT_FAST_CUDA"]
FLAGS += ["-ffp-contract=off", f"-I{HERE / 'include'}"]
SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer", "-g1", "-O1"]
NAME = "cuda_on_cpu_kernels"
BINDINGS = HERE / "module.cpp"  # never sanitized: pybind11's templates would take most of the time to compile


def compiler() -> str | None:
    """The host compiler, or None."""
    return shutil.which(os.environ.get("CXX", "g++"))


def sources() -> list[Path]:
    """Every kernel of the project, and the files of this folder."""
    return sorted([*CSRC.glob("*.cu"), *HERE.glob("*.cpp"), *HERE.glob("*.cu")])


def build(sanitize: bool = False) -> Path:
    """Path of the compiled module; compiles what has changed since the last time.

    Raises:
        RuntimeError: the compiler failed; the message is its output.
    """
    import pybind11

    kernels = [*FLAGS, *(SANITIZE if sanitize else ["-O2"])]
    python = [f"-isystem{pybind11.get_include()}", f"-isystem{sysconfig.get_paths()['include']}"]
    cache = Path(tempfile.gettempdir()) / f"cuda_on_cpu-{os.getuid()}"
    cache.mkdir(mode=0o700, exist_ok=True)
    headers = hashlib.sha256((compiler() or "").encode())
    for header in sorted([*CSRC.glob("*.h"), *CSRC.glob("*.cuh"), *HERE.glob("*.h"), *HERE.glob("include/*.h")]):
        headers.update(header.read_bytes())

    def compile_one(source: Path) -> Path:
        flags = [*FLAGS, "-O0", *python] if source == BINDINGS else kernels
        digest = headers.copy()
        digest.update(" ".join(flags).encode() + source.read_bytes())
        target = cache / f"{source.stem}-{digest.hexdigest()[:16]}.o"
        if not target.exists():
            language = ["-x", "c++"] if source.suffix == ".cu" else []
            _run([compiler(), *flags, *language, "-c", str(source)], target)
        return target

    with ThreadPoolExecutor(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 2) as pool:
        objects = list(pool.map(compile_one, sources()))
    folder = cache / hashlib.sha256("".join(map(str, objects)).encode()).hexdigest()[:16]
    folder.mkdir(exist_ok=True)
    library = folder / f"{NAME}{sysconfig.get_config_var('EXT_SUFFIX')}"
    if not library.exists():
        _run([compiler(), "-shared", *kernels, *map(str, objects)], library)
    return library


def _run(command: list[str | None], target: Path) -> None:
    """Run a compiler into a temporary file beside ``target``, then rename: another process may do the same."""
    with tempfile.NamedTemporaryFile(dir=target.parent, suffix=target.suffix, delete=False) as scratch:
        pass
    result = subprocess.run([*command, "-o", scratch.name], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if result.returncode or "warning:" in result.stdout:
        Path(scratch.name).unlink()
        raise RuntimeError(result.stdout)
    Path(scratch.name).rename(target)


def load() -> ModuleType:
    """Build and import: the sanitized module in a process started with ``environment(sanitize=True)``."""
    if NAME not in sys.modules:
        spec = importlib.util.spec_from_file_location(NAME, build(os.environ.get("CUDA_ON_CPU_SANITIZE") == "1"))
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        sys.modules[NAME] = module
    return sys.modules[NAME]


def environment(sanitize: bool) -> dict[str, str]:
    """Environment of a Python process that calls :func:`load`."""
    result = {**os.environ, "CUDA_ON_CPU_SANITIZE": str(int(sanitize))}
    if sanitize:
        # libstdc++ too, or the sanitizer does not find the functions behind exceptions, which torch throws.
        names = [f"-print-file-name={name}" for name in ("libasan.so", "libstdc++.so")]
        found = [subprocess.run([compiler(), name], stdout=subprocess.PIPE, text=True).stdout.strip() for name in names]
        result["LD_PRELOAD"] = " ".join(found)
        # Python never frees some of its memory; and a kernel's frames stay on the stack of its fiber.
        result["ASAN_OPTIONS"] = "detect_leaks=0:detect_stack_use_after_return=0"
        result["UBSAN_OPTIONS"] = "print_stacktrace=1"
    return result
