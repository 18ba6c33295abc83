"""Where builds are kept, whom they may come from, and whether they are whole. Never imports torch.

A build is a folder named by its key: the library, ``build.json`` (what it was built from, its size and SHA-256) and,
where the library could not be loaded the last time, the loader's words in ``not_loaded.txt``.
"""

from __future__ import annotations

import grp
import hashlib
import json
import os
import pwd
import secrets
import shutil
import stat
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .._files import sync
from .toolkit import BuildError

RECORD = "build.json"
NOT_LOADED = "not_loaded.txt"


def folder() -> Path:
    """Where builds are kept, one folder a build key: ``TPT_FAST_CACHE``, else the user's cache folder, and for a user
    without a home folder one in the system's folder for temporary files."""
    configured = os.environ.get("TPT_FAST_CACHE")
    try:
        if configured:
            return Path(configured).expanduser()
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tpt_fast"
    except RuntimeError as error:  # there is no home folder
        if configured:
            raise BuildError(f"TPT_FAST_CACHE: {configured!r} has no meaning here: {error}") from error
        return Path(tempfile.gettempdir()) / f"tpt_fast-{os.getuid()}"


def make(cache: Path) -> None:
    """The folder ``cache``, where it is not there yet, which nobody else may write to, whatever the umask."""
    for missing in reversed([path for path in (cache, *cache.parents) if not path.exists()]):
        missing.mkdir(mode=0o755, exist_ok=True)


def is_shared() -> bool:
    """Whether ``TPT_FAST_SHARED_CACHE`` says that the cache's owner and group are trusted.

    Raises:
        BuildError: it is neither 0 nor 1.
    """
    choice = os.environ.get("TPT_FAST_SHARED_CACHE") or "0"
    if choice not in {"0", "1"}:
        raise BuildError(f"TPT_FAST_SHARED_CACHE: expected 0 or 1, got {choice!r}")
    return choice == "1"


def check_owners(build: Path) -> None:
    """Let nobody else's code in: what is there of the cache, of the folder ``build`` in it and of its files has to
    belong to this user or root, and nobody else may write to it. In a shared cache its owner and group may too.

    Raises:
        BuildError: naming what is amiss and what to do.
    """
    cache, shared = build.parent.resolve(), is_shared()
    for path in (cache, build, *sorted(build.glob("*.so")), build / RECORD):
        try:
            status = path.stat()
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError as error:
            raise BuildError(f"{path} cannot be read: {error.strerror}.") from error
        if why := _stranger(status, shared):
            raise BuildError(
                f"{path} {why}, so what it holds may be anybody's code and is not loaded. Set TPT_FAST_CACHE to a "
                "folder of your own; or, where you trust its owner and group, take the right to write from all others "
                "and set TPT_FAST_SHARED_CACHE=1."
            )
    for path in filter(Path.exists, cache.parents):
        mode = path.stat().st_mode
        if mode & stat.S_IWOTH and not mode & stat.S_ISVTX:
            raise BuildError(
                f"{path} can be written by everyone, so what is in {cache} may be anybody's code and is not loaded. "
                "Set TPT_FAST_CACHE to another folder."
            )


def _stranger(status: os.stat_result, shared: bool) -> str | None:
    """What lets somebody else put code there, if anything."""
    # In a sticky folder such as /tmp nobody can replace what belongs to another.
    sticky = stat.S_ISDIR(status.st_mode) and status.st_mode & stat.S_ISVTX and not shared
    if status.st_mode & stat.S_IWOTH and not sticky:
        return "can be written by everyone"
    if shared:
        return None
    if status.st_uid not in {0, os.geteuid()}:
        return f"belongs to {_name(pwd.getpwuid, status.st_uid)}, not to you or root"
    if status.st_mode & stat.S_IWGRP and not sticky and not _is_private(status.st_gid):
        return f"can be written by the group {_name(grp.getgrgid, status.st_gid)}"
    return None


def _name(look_up: Callable[[int], Any], number: int) -> str:
    try:
        return look_up(number)[0]
    except KeyError:
        return str(number)


def _is_private(group: int) -> bool:
    """Whether the group is the one that many systems give each user for themselves, named like them."""
    try:
        found, user = grp.getgrgid(group), pwd.getpwuid(os.geteuid()).pw_name
    except KeyError:
        return False
    return found.gr_name == user and set(found.gr_mem) <= {user}


def digest(library: Path) -> dict[str, Any]:
    """What ``build.json`` says of the library: its name, size and SHA-256."""
    content = library.read_bytes()
    return {"name": library.name, "size": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def read_record(build: Path) -> dict[str, Any] | None:
    """What ``build.json`` says; None if the build is not there or not whole."""
    try:
        record = json.loads((build / RECORD).read_text())
        whole = record["library"] == digest(build / record["library"]["name"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return record if whole else None


def note_not_loaded(build: Path, words: str | None) -> None:
    """Keep the loader's ``words`` beside a build that it refused; None once it has taken it. For people to read."""
    note = build / NOT_LOADED
    try:
        if words is not None:
            note.write_text(words + "\n")
        elif note.exists():
            note.unlink()
    except OSError:  # somebody else's cache
        pass


def store(build: Path, compile_into: Callable[[Path], object], *, again: bool = False) -> None:
    """Have ``compile_into`` fill the folder ``build`` of the cache, unless another process has done so meanwhile.

    Args:
        again: even if there is a whole build.

    Raises:
        BuildError: the folder cannot be written; and what ``compile_into`` raises.
    """
    cache, shared = build.parent, is_shared()
    try:
        make(cache)
        tempfile.TemporaryFile(dir=cache).close()
    except OSError as error:
        raise BuildError(
            f"the cache folder {cache} cannot be written ({error}). Set TPT_FAST_CACHE to a folder that can."
        ) from error
    check_owners(build)
    try:
        from filelock import FileLock
    except ImportError as error:
        raise BuildError("filelock is missing: pip install filelock") from error

    # The operating system drops the lock with the process that held it, so a killed build blocks nobody.
    with FileLock(cache / f"{build.name}.lock", mode=0o664 if shared else 0o644):
        if not again and read_record(build):
            return
        for abandoned in cache.glob(f"{build.name}.tmp-*"):
            shutil.rmtree(abandoned, ignore_errors=True)
        scratch = cache / f"{build.name}.tmp-{secrets.token_hex(4)}"
        scratch.mkdir(mode=0o755)
        try:
            compile_into(scratch)
            for file in (*scratch.iterdir(), scratch):
                mode = stat.S_IMODE(file.stat().st_mode) & ~0o022
                if shared:  # whatever the umask: the group may do what its owner may, others may read
                    mode |= (mode & 0o700) >> 3 | (mode & 0o500) >> 6
                file.chmod(mode)
                sync(file)  # before the rename: a library cut short by a power failure kills who maps it
            shutil.rmtree(build, ignore_errors=True)
            scratch.rename(build)
            sync(cache)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
