"""Find or build the extension, once a process, at first use and never at import.

``TPT_FAST_BACKEND``: ``auto`` (default) falls back to the PyTorch reference with one warning; ``native`` makes that an
error; ``reference`` skips the build. ``TPT_FAST_CACHE``: where builds are kept instead of the user's cache folder.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import threading
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch

from . import _build
from ._toolkit import BuildError

__all__ = ["Backend", "BackendWarning", "BuildError", "cache_folder", "ensure"]


class BackendWarning(UserWarning):
    """The compiled kernels are not available, and the slower PyTorch reference runs in their place."""


@dataclass(frozen=True)
class Backend:
    """What runs the ops: ``name`` is "native" or "reference"; ``why`` says why it is not native."""

    name: str
    path: Path | None = None
    why: str = ""


_lock = threading.Lock()
_backend: Backend | None = None


def cache_folder() -> Path:
    """Where builds are kept, one folder a build key."""
    if configured := os.environ.get("TPT_FAST_CACHE"):
        return Path(configured).expanduser()
    from platformdirs import user_cache_path

    return user_cache_path("tpt_fast")


def ensure() -> Backend:
    """Make the kernels available and say what runs; building takes up to half a minute, the first time only.

    Raises:
        BuildError: the kernels cannot be had and ``TPT_FAST_BACKEND=native``.
        ValueError: ``TPT_FAST_BACKEND`` is none of its three values.
    """
    global _backend
    if _backend is None:
        with _lock:
            if _backend is None:
                _backend = _choose()
    return _backend


def _choose() -> Backend:
    wanted = os.environ.get("TPT_FAST_BACKEND", "auto")
    if wanted not in {"auto", "native", "reference"}:
        raise ValueError(f"TPT_FAST_BACKEND: expected auto, native or reference, got {wanted!r}")
    if wanted == "reference":
        return Backend("reference", why="TPT_FAST_BACKEND=reference")
    try:
        path = _ahead_of_time() or _cached_or_built()
        torch.ops.load_library(path)
        return Backend("native", path)
    except (BuildError, OSError) as error:
        if wanted == "native":
            raise BuildError(f"TPT_FAST_BACKEND=native, but the kernels are not available: {error}") from error
        warnings.warn(
            f"tpt_fast: the compiled kernels are not available, so the PyTorch reference runs in their place: same "
            f"results, slower. {error}\n`tpt-fast doctor` shows what was found. TPT_FAST_BACKEND=reference silences this.",
            BackendWarning,
            stacklevel=4,
        )
        return Backend("reference", why=str(error))


def _ahead_of_time() -> Path | None:
    path = Path(__file__).parent / _build.LIBRARY
    return path if path.exists() else None


def _cached_or_built() -> Path:
    plan = _build.plan()
    cache = cache_folder()
    final = cache / plan.key()
    library = final / _build.LIBRARY
    if library.exists():
        return library
    try:
        cache.mkdir(parents=True, exist_ok=True)
        probe = tempfile.TemporaryFile(dir=cache)
        probe.close()
    except OSError as error:
        raise BuildError(
            f"the cache folder {cache} cannot be written ({error}). Set TPT_FAST_CACHE to a folder that can."
        ) from error
    from filelock import FileLock

    # The operating system drops the lock with the process that held it, so a killed build blocks nobody.
    with FileLock(cache / f"{final.name}.lock"):
        if library.exists():
            return library
        for abandoned in cache.glob(f"{final.name}.tmp-*"):
            shutil.rmtree(abandoned, ignore_errors=True)
        scratch = Path(tempfile.mkdtemp(prefix=f"{final.name}.tmp-", dir=cache))
        try:
            _build.build(plan, scratch)
            scratch.rename(final)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    return library
