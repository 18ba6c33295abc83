"""The images that a command is given: files, and folders of them."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import typer

from . import _shared


class Images(NamedTuple):
    files: list[Path]
    unreadable: int  #: folders that could not be looked into


def find_images(arguments: list[str]) -> Images:
    """Files as they are named, folders by what is in them; what is passed over there is said on stderr.

    Links to folders are followed, and not back up; hidden files and folders are passed over.
    """
    from ..views.decode import endings, local_path

    files: list[Path] = []
    unreadable = 0
    for argument in arguments:
        if not argument:  # an unset shell variable; Path would make it the current folder
            raise typer.BadParameter("expected a file or folder, got ''", param_hint="IMAGE")
        with _shared.usage("IMAGE"):
            path = local_path(argument)
        if not os.path.isdir(path):
            files.append(path)
            continue
        passed_over: Counter[str] = Counter()
        inside = sorted(_walk(path, endings(), passed_over))
        if passed_over:
            counts = ", ".join(f"{what} ({count})" for what, count in sorted(passed_over.items()))
            _shared.remark(f"{path}: passed over: {counts}")
        unreadable += passed_over["unreadable folders"]
        if not inside:
            known = " ".join(sorted(endings()))
            raise typer.BadParameter(f"{path} holds no images that can be read ({known})", param_hint="IMAGE")
        files += inside
    return Images(files, unreadable)


def _walk(top: Path, endings: frozenset[str], passed_over: Counter[str]) -> Iterator[Path]:
    def unreadable(error: OSError) -> None:
        passed_over["unreadable folders"] += 1
        _shared.complain(f"{error.filename} cannot be read: {error.strerror}")

    above = {os.fspath(top): frozenset([_identity(top)])}  # folder -> itself and those that it was reached through
    for folder, folders, names in os.walk(top, onerror=unreadable, followlinks=True):
        chain, kept = above.pop(folder), []
        for name in folders:
            path = os.path.join(folder, name)
            try:
                identity = _identity(path)
            except OSError as error:
                unreadable(error)
                continue
            if name.startswith(".") or name == "__MACOSX":
                passed_over["hidden folders"] += 1
            elif identity in chain:
                passed_over["links back to a folder above"] += 1
            else:
                above[path] = chain | {identity}
                kept.append(name)
        folders[:] = kept
        for name in names:
            file = Path(folder, name)
            if name.startswith("."):
                passed_over["hidden files"] += 1
            elif file.suffix.lower() not in endings:
                passed_over[f"{file.suffix.lower() or 'files without an ending'}"] += 1
            elif os.path.isfile(file) or not os.path.exists(file):  # a dangling link has its row, which says so
                yield file
            else:
                passed_over["devices, pipes, sockets"] += 1


def _identity(folder: str | os.PathLike) -> tuple[int, int]:
    found = os.stat(folder)
    return found.st_dev, found.st_ino
