"""Files that are whole or not there."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def written_aside(path: str | os.PathLike) -> Iterator[Path]:
    """A name to write to, with the ending of ``path``; it takes ``path``'s place if nothing is raised.

    Where ``path`` is a link, what it leads to is replaced.

    Raises:
        OSError: ``path`` is there and is not a regular file.
    """
    target, aside = _places(path)
    try:
        yield aside
        os.replace(aside, target)
    finally:
        aside.unlink(missing_ok=True)


def check_writable(path: str | os.PathLike) -> None:
    """Raise now the OSError that writing ``path`` aside would raise; it leaves nothing behind."""
    _, aside = _places(path)
    aside.touch()
    aside.unlink()


def _places(path: str | os.PathLike) -> tuple[Path, Path]:
    target = Path(os.path.realpath(path))
    if target.exists() and not target.is_file():
        raise OSError(errno.EEXIST, "it is not a regular file", os.fspath(path))
    return target, target.with_name(f".{target.name}.tmp{Path(path).suffix}")
