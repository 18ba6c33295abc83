"""Atomic writes: a file is whole or as it was, whoever writes beside us and whenever the power goes."""

from __future__ import annotations

import errno
import fcntl
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def atomic_write(path: str | os.PathLike) -> Iterator[Path]:
    """A new, empty file beside ``path`` to write to, with its ending; it takes ``path``'s place if nothing is raised.

    Its name is this writer's own and nobody can predict it. It has the permissions of the file that it replaces, or of
    any new file. Where ``path`` is a link, what it leads to is replaced.

    Raises:
        OSError: ``path`` is there and is not a regular file, or cannot be written.
    """
    target = _target(path)
    aside = _create_beside(target)
    try:
        yield aside
        sync(aside)
        with suppress(FileNotFoundError):
            shutil.copymode(target, aside)
        os.replace(aside, target)
        with suppress(OSError):  # a folder that may not be read, a file system that knows no such thing
            sync(target.parent)
    finally:
        aside.unlink(missing_ok=True)


@contextmanager
def locked(path: str | os.PathLike) -> Iterator[None]:
    """Alone among those who ask for the same ``path``: for reading it, changing it and writing it again.

    The lock is the file ``.NAME.lock`` beside it, which stays. Not filelock's, which waits for ever in a folder
    where nothing can be made.

    Raises:
        OSError: the lock cannot be made there.
    """
    target = _target(path)
    lock = os.open(target.with_name(f".{target.name}.lock"), os.O_CREAT | os.O_RDWR | os.O_NOFOLLOW, 0o666)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)


def check_writable(path: str | os.PathLike) -> None:
    """Raise now the OSError that :func:`atomic_write` would raise; it leaves nothing behind."""
    _create_beside(_target(path)).unlink()


def _target(path: str | os.PathLike) -> Path:
    target = Path(os.path.realpath(path))
    if target.exists() and not target.is_file():
        raise OSError(errno.EEXIST, "it is not a regular file", os.fspath(path))
    return target


def _create_beside(target: Path) -> Path:
    """O_EXCL fails at a name that is taken, by a link too."""
    aside = target.with_name(f".tpt-fast-{secrets.token_hex(8)}{target.suffix}")
    os.close(os.open(aside, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
    return aside


def sync(path: Path) -> None:
    """To the disk, a file's content or a folder's names."""
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)
