"""Find or build the extension, once a process, at first use and never at import.

``TPT_FAST_BACKEND``: ``auto`` (default) falls back to the PyTorch reference with one warning; ``native`` makes that an
error; ``reference`` skips the build. ``TPT_FAST_CACHE``: where builds are kept instead of the user's cache folder.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
import threading
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from . import build
from .toolkit import BuildError

__all__ = ["Backend", "BackendWarning", "BuildError", "cache_folder", "ensure"]


class BackendWarning(UserWarning):
    """The compiled kernels are not available, and the slower PyTorch reference runs in their place."""


@dataclass(frozen=True)
class Backend:
    """What runs the ops: ``name`` is "native" or "reference"; ``why`` says why it is not native."""

    name: str
    path: Path | None = None
    why: str = ""


Progress = Callable[[int, int], None]

_lock = threading.Lock()
_backend: Backend | None = None


def cache_folder() -> Path:
    """Where builds are kept, one folder a build key."""
    if configured := os.environ.get("TPT_FAST_CACHE"):
        return Path(configured).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tpt_fast"


def ensure(progress: Progress | None = None, *, rebuild: bool = False) -> Backend:
    """Make the kernels available and say what runs; building takes a minute or two, the first time only.

    Args:
        progress: called with (files compiled, files in all) while building; by default a line on stderr says that it
            has begun.
        rebuild: build again even if there is a build. It serves the next process; a loaded library stays loaded.

    Raises:
        BuildError: the kernels cannot be had and ``TPT_FAST_BACKEND=native``.
        ValueError: ``TPT_FAST_BACKEND`` is none of its three values.
    """
    global _backend
    if _backend is None or rebuild:
        with _lock:
            if _backend is None or rebuild:
                _backend = _choose(progress or _announce, rebuild)
    return _backend


# torch.compiler.assume_constant_result without its two seconds of import: torch.compile would trace into the lock.
ensure._dynamo_marked_constant = True


def _announce(done: int, _total: int) -> None:
    if done == 0:
        print("tpt_fast: compiling the kernels for this machine, once; a minute or two ...", file=sys.stderr)


def _choose(progress: Progress, rebuild: bool) -> Backend:
    wanted = os.environ.get("TPT_FAST_BACKEND") or "auto"
    if wanted not in {"auto", "native", "reference"}:
        raise ValueError(f"TPT_FAST_BACKEND: expected auto, native or reference, got {wanted!r}")
    if wanted == "reference":
        return Backend("reference", why="TPT_FAST_BACKEND=reference")
    try:
        return Backend("native", _load(progress, rebuild))
    except (BuildError, OSError) as error:
        if wanted == "native":
            raise BuildError(f"TPT_FAST_BACKEND=native, but the kernels are not available: {error}") from error
        warnings.warn(
            "tpt_fast: the compiled kernels are not available, so the PyTorch reference runs in their place: same "
            f"results, slower. {error}\n"
            "`tpt-fast doctor` shows what was found. TPT_FAST_BACKEND=reference silences this.",
            BackendWarning,
            stacklevel=4,
        )
        return Backend("reference", why=str(error))


def _load(progress: Progress, rebuild: bool) -> Path:
    packaged = Path(__file__).parent.parent / build.LIBRARY
    if packaged.exists():  # built ahead of time
        torch.ops.load_library(packaged)
        return packaged
    plan = build.plan()
    final = cache_folder() / plan.key()
    library = final / build.LIBRARY
    if library.exists() and not rebuild:
        try:
            torch.ops.load_library(library)
            return library
        except OSError:  # cut short by a full disk or a copy: made again below
            pass
    _store(plan, final, progress, {library.stat().st_ino} if library.exists() else set())
    torch.ops.load_library(library)
    return library


def _store(plan: build.Plan, final: Path, progress: Progress, unwanted: set[int]) -> None:
    """Build ``plan`` into the folder ``final`` of the cache, unless another process has done so meanwhile.

    Args:
        unwanted: inode of a library that is there but must be replaced.
    """
    cache, library = final.parent, final / build.LIBRARY
    try:
        cache.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=cache).close()
    except OSError as error:
        raise BuildError(
            f"the cache folder {cache} cannot be written ({error}). Set TPT_FAST_CACHE to a folder that can."
        ) from error
    from filelock import FileLock

    # The operating system drops the lock with the process that held it, so a killed build blocks nobody.
    with FileLock(cache / f"{final.name}.lock"):
        if library.exists() and library.stat().st_ino not in unwanted:
            return
        for abandoned in cache.glob(f"{final.name}.tmp-*"):
            shutil.rmtree(abandoned, ignore_errors=True)
        scratch = Path(tempfile.mkdtemp(prefix=f"{final.name}.tmp-", dir=cache))
        try:
            build.build(plan, scratch, progress)
            shutil.rmtree(final, ignore_errors=True)
            scratch.rename(final)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
