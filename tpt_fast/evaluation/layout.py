"""Where a set is below a root: the layouts in use, without regard to case, or one level off."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from . import checks
from .known import plain


class Place(NamedTuple):
    folder: Path
    note: str | None  #: what was not as expected


def locate(name: str, root: Path, folders: Sequence[str], share: Callable[[Path], float], what: str) -> Place:
    """The one of ``folders`` below ``root`` that has the most of what is expected.

    Where none has any, ``root`` may be a level off: it, its sub-folders, and the ends of ``folders`` below it and them
    are tried, and what is found there has to be half of what is expected and in one place.

    Args:
        share: of a folder, how much of what is expected it has, 0 to 1.
        what: is expected, for the message.

    Raises:
        FileNotFoundError: it is nowhere; says where it was looked for.
        ValueError: it is in several places, none of which is one of ``folders``.
    """
    inside = [path for relative in folders for path in _matching(root, relative)]
    if inside:
        best = max(inside, key=share)
        if share(best) > 0:
            return Place(best, None)
    found: dict[str, Path] = {}
    for around in (_too_low, _too_high):
        if not found:
            there = (path for path in around(root, folders) if path not in inside and share(path) >= 0.5)
            found = {os.path.realpath(path): path for path in there}
    if len(found) > 1:
        raise ValueError(
            f"{name}: {what} may be in any of {checks.some(found.values())}; expected one of {', '.join(folders)} "
            f"below {root}"
        )
    for path in found.values():
        return Place(path, f"root is a level off: {name} is in {path}, expected {folders[0]} below {root}")
    empty = f"; {checks.some(inside)} has none of it" if inside else ""
    raise FileNotFoundError(f"{name}: expected {what} in one of {', '.join(folders)} below {root}{empty}")


def find_file(folders: Sequence[Path], names: Sequence[str]) -> Iterator[Path]:
    """Files of these names in the folders, without regard to case and underscores."""
    wanted, seen = {plain(name) for name in names}, set()
    for folder in folders:
        for path in sorted(_entries(folder)):
            real = os.path.realpath(path)
            if plain(path.name) in wanted and path.is_file() and real not in seen:
                seen.add(real)
                yield path


def subfolders(folder: Path) -> list[str]:
    """Names of the folders in it, linked ones too and hidden ones not, in the order of Python's strings."""
    with os.scandir(folder) as entries:
        return sorted(entry.name for entry in entries if entry.is_dir() and _shown(entry.name))


def _shown(name: str) -> bool:
    return not name.startswith(".") and name != "__MACOSX"


def _ends(folders: Sequence[str]) -> list[str]:
    return list(dict.fromkeys("/".join(parts[i:]) for parts in map(_parts, folders) for i in range(1, len(parts))))


def _too_low(root: Path, folders: Sequence[str]) -> Iterator[Path]:
    yield root
    for end in _ends(folders):
        yield from _matching(root, end)


def _too_high(root: Path, folders: Sequence[str]) -> Iterator[Path]:
    for name in subfolders(root):
        if os.access(root / name, os.R_OK | os.X_OK):
            yield root / name
            for relative in (*folders, *_ends(folders)):
                yield from _matching(root / name, relative)


def _parts(relative: str) -> list[str]:
    return relative.split("/")


def _matching(root: Path, relative: str) -> list[Path]:
    """Folders below ``root`` that are called so."""
    found = [root]
    for part in _parts(relative):
        found = [each for folder in found for each in sorted(_entries(folder)) if each.name.lower() == part.lower()]
        found = [each for each in found if each.is_dir()]
    return found


def _entries(folder: Path) -> list[Path]:
    try:
        return list(folder.iterdir())
    except OSError:
        return []
