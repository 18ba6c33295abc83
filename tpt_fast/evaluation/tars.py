"""Tars as webdataset and CLIP_benchmark write them: ``KEY.jpg`` beside ``KEY.cls``, read in place."""

from __future__ import annotations

import os
import re
import tarfile
from array import array
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from . import checks
from .folders import path_name
from .layout import subfolders
from .names import Labels, given
from .sets import ImageSet, Rows

_COUNT = "nshards.txt"


def find(folder: Path) -> list[Path]:
    """The tars in a folder, or in its sub-folder ``test``, in the order of their numbers.

    Raises:
        ValueError: archives lie beside folders, which may be what is meant.
    """
    for place in (folder, folder / "test"):
        if place.is_dir() and (found := [each for each in place.iterdir() if each.suffix.lower() == ".tar"]):
            if place == folder and (beside := subfolders(folder)):
                raise ValueError(
                    f"{folder} has tars ({checks.some(sorted(each.name for each in found), 2)}) and folders "
                    f"({checks.some(beside, 2)}): name a tar, or the folders as imagefolder:{folder}"
                )
            return sorted(
                found, key=lambda each: [int(p) if p.isdecimal() else p for p in re.split(r"(\d+)", each.name)]
            )
    return []


class Members:
    """Images by where their bytes begin in which tar."""

    def __init__(self, tars: Sequence[Path], tar: array, begins: array, sizes: np.ndarray) -> None:
        self.tars = [str(each) for each in tars]
        self.tar, self.begins, self.sizes = np.array(tar, np.int32), np.array(begins, np.int64), sizes

    def __call__(self, i: int, id: str) -> bytes:
        with open(self.tars[self.tar[i]], "rb") as file:
            file.seek(int(self.begins[i]))
            return file.read(int(self.sizes[i]))


def open_tars(tars: Sequence[Path], folder: Path, classnames: Sequence[str] | None = None) -> ImageSet:
    """Images and labels of tars; ids are the tar's name and the member's.

    Names, in label order, are ``classnames`` or those in ``classnames.txt`` beside the tars or above them.
    """
    from ..views.decode import endings

    beside = tars[0].parent
    _check_count(tars, beside)
    names = given(classnames, dict.fromkeys([beside, folder, beside.parent]))
    labels, rows = Labels(folder, names), Rows()
    which, begins = array("i"), array("q")
    for number, path in enumerate(tars):
        waiting: dict[str, tarfile.TarInfo] = {}  # images whose label has not come yet
        label_of: dict[str, int] = {}
        try:
            with tarfile.open(path, "r:") as tar:
                for member in tar:
                    if not member.isreg():
                        continue
                    key, ending = os.path.splitext(member.name)
                    if ending.lower() == ".cls":
                        file = tar.extractfile(member)
                        assert file is not None
                        label_of[key] = labels.meet(file.read().decode().strip())
                    elif ending.lower() in endings():
                        if key in waiting:
                            raise ValueError(f"{path}: {waiting[key].name} and {member.name} are images of one key")
                        waiting[key] = member
                    tar.members = []  # type: ignore[attr-defined]  # which tarfile keeps, and are megabytes
        except tarfile.TarError as error:
            raise ValueError(
                f"{path} is no tar that can be read in place ({error}); unpack what is compressed"
            ) from error
        if without := [member.name for key, member in waiting.items() if key not in label_of]:
            raise ValueError(f"{path}: {len(without)} images have no label (KEY.cls): {without[0]}")
        if without := [key for key in label_of if key not in waiting]:
            raise ValueError(f"{path}: {len(without)} labels have no image: {without[0]}.cls")
        for key, member in waiting.items():
            rows.add(f"{path.name}/{member.name}", label_of[key], member.size)
            which.append(number)
            begins.append(member.offset_data)
    name = path_name(folder if len(tars) > 1 or folder != beside else tars[0].with_suffix(""))
    if not len(rows):
        raise ValueError(f"{name}: no images in {tars[0]} and the {len(tars) - 1} tars beside it")
    places, found = labels.resolve()
    rows.relabel(places)
    return rows.to_set(name, found, Members(tars, which, begins, rows.sizes))


def _check_count(tars: Sequence[Path], folder: Path) -> None:
    file = folder / _COUNT
    if file.is_file() and len(tars) > 1 and (expected := int(file.read_text().strip())) != len(tars):
        raise ValueError(f"{folder}: expected {expected} tars, as {_COUNT} says, found {len(tars)}")
