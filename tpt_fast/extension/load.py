"""Find or build the extension's two halves, once a process, at first use and never at import.

The CPU's kernels are there as soon as they are compiled; CUDA's are compiled beside that, once the process uses a GPU,
and waited for when a tensor on it comes. Either half can fail, and the PyTorch reference runs in its place alone.
``docs/environment.md`` has the environment variables.
"""

from __future__ import annotations

import os
import sys
import threading
import warnings
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path

import torch

from . import build, cache
from .toolkit import BuildError

__all__ = ["Backend", "BackendWarning", "BuildError", "ensure"]


class BackendWarning(UserWarning):
    """The compiled kernels are not available, and the slower PyTorch reference runs in their place."""


@dataclass(frozen=True)
class Backend:
    """What runs the ops: ``name`` is "native" or "reference"; ``why`` says why it is not native."""

    name: str
    path: Path | None = None
    why: str = ""

    def __str__(self) -> str:
        return self.name + (f": {self.why.partition(chr(10))[0]}" if self.why else "")


Progress = Callable[[int, int], None]

_decided: dict[torch.device | str, Backend] = {}  # by half, and by device to be quick: every call of an op asks
_locks = {half: threading.Lock() for half in build.LIBRARIES}
_background: list[_Background] = []  # the one that builds CUDA's half, until somebody has waited for it


def ensure(device: torch.device | str = "cpu", *, progress: Progress | None = None, rebuild: bool = False) -> Backend:
    """Make the kernels for ``device`` available and say what runs; building them takes a minute, the first time only.

    Args:
        device: of the tensors to come. For one on CUDA this waits until its kernels are compiled.
        progress: called with (files compiled, files in all) while building; by default a line on stderr says that it
            has begun.
        rebuild: build again even if there is a build. It serves the next process; a loaded library stays loaded.

    Raises:
        BuildError: the kernels cannot be had and ``TPT_FAST_BACKEND=native``.
        ValueError: ``TPT_FAST_BACKEND`` is none of its three values, or ``TPT_FAST_CUDA`` none of its two.
    """
    if rebuild or device not in _decided:
        half = "cuda" if str(device).startswith("cuda") else "cpu"
        if half == "cuda" and "cpu" not in _decided:
            ensure("cpu", progress=progress)
        with _locks[half]:
            if rebuild or half not in _decided:
                _decided[half] = _choose(half, progress or _announce(half), rebuild)
                if half == "cpu" and not rebuild:
                    _begin_cuda()
        _decided[device] = _decided[half]
    return _decided[device]


# torch.compiler.assume_constant_result without its two seconds of import: torch.compile would trace into the lock.
ensure._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _announce(half: str) -> Progress:
    what = "the kernels for this CPU" if half == "cpu" else "the CUDA kernels"

    def say(done: int, _total: int) -> None:
        if done == 0:
            print(f"tpt_fast: compiling {what}, once; a minute or so ...", file=sys.stderr)

    return say


def _choose(half: str, progress: Progress, rebuild: bool) -> Backend:
    wanted = os.environ.get("TPT_FAST_BACKEND") or "auto"
    if wanted not in {"auto", "native", "reference"}:
        raise ValueError(f"TPT_FAST_BACKEND: expected auto, native or reference, got {wanted!r}")
    build.cuda_choice()  # a misspelt one is an error for either half
    if wanted == "reference":
        return Backend("reference", why="TPT_FAST_BACKEND=reference")
    kernels = "compiled kernels" if half == "cpu" else "compiled CUDA kernels"
    try:
        if half == "cuda" and (unwanted := _no_cuda()):
            return Backend("reference", why=unwanted)
        return Backend("native", _load(half, progress, rebuild))
    except (BuildError, OSError) as error:
        if wanted == "native":
            raise BuildError(f"TPT_FAST_BACKEND=native, but the {kernels} are not available: {error}") from error
        _warn(
            f"the {kernels} are not available, so the PyTorch reference runs in their place: same results, slower. "
            f"{error}\n`tpt-fast doctor` shows what was found. TPT_FAST_BACKEND=reference silences this."
        )
        return Backend("reference", why=str(error))


def _warn(message: str) -> None:
    warnings.warn(f"tpt_fast: {message}", BackendWarning, stacklevel=5)


def _no_cuda() -> str | None:
    """Why nobody wants CUDA's half, if so."""
    choice = build.cuda_choice()
    if choice is False:
        return "TPT_FAST_CUDA=0"
    return None if choice or torch.cuda.is_available() else "torch sees no GPU"


def _load(half: str, progress: Progress, rebuild: bool) -> Path:
    prebuilt = Path(__file__).parent.parent / "_kernels" / half  # built ahead of time, beside the package's code
    if (prebuilt / cache.RECORD).exists():
        try:
            return _open(prebuilt)
        except BuildError as error:
            _warn(f"the compiled kernels that were installed cannot be used and are compiled here instead. {error}")
    if half == "cuda" and _background and not rebuild:
        return _open(_background[0].wait(progress))
    return _open(_build(half, progress, rebuild))


def _build(half: str, progress: Progress, rebuild: bool = False) -> Path:
    """The folder of a build of one half, in the cache, which is whole and may be loaded."""
    plan = build.plan(half)
    folder = cache.folder() / plan.key()
    cache.check_owners(folder)
    if rebuild or cache.read_record(folder) is None:
        cache.store(folder, lambda scratch: build.build(plan, scratch, progress), again=rebuild)
    return folder


def _open(folder: Path) -> Path:
    """Load the library of a build into this process, unless it is there already."""
    record = cache.read_record(folder)
    if record is None:
        raise BuildError(f"{folder} is damaged.")
    library = folder / record["library"]["name"]
    if lacks := build.missing_sets(record):
        raise BuildError(f"{library} needs a CPU with {', '.join(lacks)}, which this one does not have.")
    if str(library.resolve()) not in torch.ops.loaded_libraries:
        try:
            torch.ops.load_library(library)
        except OSError as error:
            words = str(error.__cause__ or error)
            cache.note_not_loaded(folder, words)
            raise BuildError(
                f"{library} was compiled, but cannot be loaded: {words}. Where the folder is mounted noexec, set "
                "TPT_FAST_CACHE to another one. `tpt-fast doctor --build` compiles anew, which nothing else does."
            ) from error
        cache.note_not_loaded(folder, None)
    return library


class _Background(threading.Thread):
    """Builds CUDA's half into the cache while the CPU's is in use already.

    A daemon: the process may end before it, and the compilers end with the process.
    """

    def __init__(self) -> None:
        super().__init__(name="tpt_fast-build", daemon=True)
        self.progress, self.folder = _announce("cuda"), Future[Path]()

    def run(self) -> None:
        try:
            self.folder.set_result(_build("cuda", lambda *step: self.progress(*step)))
        except Exception as error:  # raised where it is waited for
            self.folder.set_exception(error)

    def wait(self, progress: Progress) -> Path:
        self.progress = progress
        try:
            return self.folder.result()
        finally:
            _background.clear()


def _begin_cuda() -> None:
    """Start on CUDA's half where it will be needed: a process that leaves the GPU alone compiles nothing for it."""
    if _decided["cpu"].name != "native" or "cuda" in _decided or _background:
        return
    if os.environ.get("TPT_FAST_CUDA") == "1" or (torch.cuda.is_initialized() and not _no_cuda()):
        _background.append(_Background())
        _background[0].start()
