"""An image set: ids, labels, class names and where the images are. Opening one checks all of it and reads no image."""

from __future__ import annotations

import hashlib
import json
import os
from array import array
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from .._checks import check_choice
from . import checks
from .known import SETS, canonical
from .strings import Strings

if TYPE_CHECKING:
    from ..views.decode import ImageLike

__all__ = ["DEFAULT_TEMPLATE", "SETS", "ImageSet", "open_set"]

PARTS = ("test", "train")
DEFAULT_TEMPLATE = "a photo of a {}."


@dataclass(frozen=True, eq=False)
class ImageSet:
    """N images of C classes, a few dozen bytes each; made by :func:`open_set`."""

    name: str  #: "imagenet_a", "food101", "food101-official" ..., or that of the folder or file
    classnames: tuple[str, ...]  #: C
    ids: Strings  #: N, without repeats: paths below the folder of images, the same on every machine
    labels: np.ndarray  #: int64 [N], in 0..C-1
    sizes: np.ndarray  #: int64 [N], bytes of each image as it is stored
    source: Callable[[int, str], ImageLike]  #: from an image's place and id to what ``load_image`` takes
    templates: tuple[str, ...] = (DEFAULT_TEMPLATE,)  #: the default prompt, then that of the set in CoOp
    notes: tuple[str, ...] = ()  #: what was found while opening and is no error

    def __post_init__(self) -> None:
        if not len(self):
            raise ValueError(f"{self.name}: there are no images")
        if len(self.labels) != len(self) or len(self.sizes) != len(self):
            raise ValueError(f"{self.name}: {len(self)} ids, {len(self.labels)} labels and {len(self.sizes)} sizes")
        low, high = int(self.labels.min()), int(self.labels.max())
        if low < 0 or high >= len(self.classnames):
            raise ValueError(f"{self.name}: expected labels 0 to {len(self.classnames) - 1}, got {low} to {high}")
        if repeat := self.ids.first_repeat():
            raise ValueError(f"{self.name}: rows {repeat[0]} and {repeat[1]} are both {self.ids[repeat[0]]!r}")
        if double := checks.double_names(self.classnames):
            object.__setattr__(self, "notes", (*self.notes, double))

    def __len__(self) -> int:
        return len(self.ids)

    def id(self, i: int) -> str:
        return self.ids[i]

    def label(self, i: int) -> int:
        return int(self.labels[i])

    def image(self, i: int) -> ImageLike:
        """What :func:`tpt_fast.load_image` takes."""
        return self.source(i, self.ids[i])

    @cached_property
    def digest(self) -> str:
        """sha256 over ids, labels, class names and the images' sizes: two severities of a corruption, whose ids are
        the same, have two."""
        found = hashlib.sha256(json.dumps(self.classnames).encode())
        for part in (*self.ids.content(), *(a.astype("<i8").tobytes() for a in (self.labels, self.sizes))):
            found.update(part)
        return found.hexdigest()


@dataclass(frozen=True)
class Files:
    """Images that are files below a folder."""

    folder: str

    def __call__(self, i: int, id: str) -> str:
        return os.path.join(self.folder, id)


class Rows:
    """Ids, labels and sizes as they are found."""

    def __init__(self) -> None:
        self.ids, self._labels, self._sizes = Strings(), array("q"), array("q")

    def add(self, id: str, label: int, size: int) -> None:
        self.ids.append(id)
        self._labels.append(label)
        self._sizes.append(size)

    def relabel(self, places: Sequence[int]) -> None:
        """Labels were numbers of what ``places`` has the place of."""
        self._labels = array("q", np.array(places, np.int64)[np.array(self._labels, np.int64)].tobytes())

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def sizes(self) -> np.ndarray:
        return np.array(self._sizes, np.int64)

    def to_set(
        self,
        name: str,
        classnames: Iterable[str],
        source: Callable[[int, str], ImageLike],
        *,
        templates: Sequence[str] = (),
        notes: Iterable[str] = (),
    ) -> ImageSet:
        templates = (DEFAULT_TEMPLATE, *(each for each in templates if each != DEFAULT_TEMPLATE))
        labels = np.array(self._labels, np.int64)
        return ImageSet(name, tuple(classnames), self.ids, labels, self.sizes, source, templates, tuple(notes))


def open_set(
    name: str | os.PathLike,
    root: str | os.PathLike | None = None,
    *,
    as_published: bool = False,
    subset: bool = False,
    classnames: Sequence[str] | None = None,
    splits: str | os.PathLike | None = None,
    part: str = "test",
) -> ImageSet:
    """Find a set of images below ``root``, and check counts, classes, splits and that every file is there.

    Args:
        name: one of

            - a set of :data:`SETS`, by its id or as TPT, CoOp, TDA or torchvision write it: ``"imagenet_a"``, ``"A"``,
              ``"Flower102"``, ``"OxfordPets"``; ``"food101-official"``, ``"flowers102-official"``, ``"dtd-official"``
              for these data sets' own test sets, which are others than CoOp's;
            - ``"cifar10"``, ``"cifar100"`` (through torchvision), ``"tiny-imagenet"``, ``"tiny-imagenet-demo"`` (the
              demo model's hundred classes of it);
            - a folder with a folder for each class, also ``"imagefolder:PATH"``;
            - a ``.csv`` or ``.parquet`` file with columns ``path`` and ``label``;
            - a ``.tar`` or a folder of them, as webdataset and CLIP_benchmark write them.

        root: the folder that has the sets of images, in any of the layouts that TPT's, CoOp's, ZERO's and
            torchvision's users have, or one a level off. Of a table, the folder that its paths begin at.
        as_published: of Food101, the class list of TPT's code, where two classes are exchanged. No other set differs.
        subset: take what is there of a set of :data:`SETS`, though counts and classes do not hold; the set's name
            ends in "-subset" then. What is there is checked as always.
        classnames: of a table, of tars or of numbered folders: the names, in label order.
        splits: folder of CoOp's split files, or one of them; default: they are looked for below ``root``.
        part: of a set of :data:`SETS`, "test", or "train", the training images of CoOp's split file. A folder, a table
            or tars are one part, which the caller has named.

    Raises:
        FileNotFoundError: nothing like it is there; says what was looked for. Or files are missing that a split or a
            table names.
        ValueError: counts, classes, labels or names do not hold; two places that may be meant; an unknown name.
        ImportError: pyarrow, torchvision or scipy is needed and missing.
    """
    check_choice("part", part, PARTS)
    written = os.fspath(name)
    known = canonical(written)
    if known is not None:
        if root is None:
            raise ValueError(
                f"root: expected the folder that has {known}, got None; a folder of that name is ./{written}"
            )
        folder = checks.folder("root", root)
        id = known.removesuffix("-official")
        if part != "test" and (id not in SETS or SETS[id].split is None or id != known):
            raise ValueError(
                f"part: expected 'test' with {known}; of its training images name the folder, got {part!r}"
            )
        if id not in SETS:
            from . import small

            return small.open_small(id, folder)
        if SETS[id].synsets is not None:
            from . import folders

            return folders.open_known(SETS[id], folder, subset=subset)
        from . import fine_grained

        return fine_grained.open_known(
            SETS[id], folder, as_published=as_published, subset=subset, splits=splits, official=known != id, part=part
        )
    path = Path(written.removeprefix("imagefolder:")).expanduser()
    ending = path.suffix.lower()
    if path.is_dir():
        from . import folders, tars

        if not written.startswith("imagefolder:") and (found := tars.find(path)):
            return tars.open_tars(found, path, classnames)
        return folders.open_folder(path, classnames)
    if path.is_file() and ending in (".csv", ".parquet"):
        from . import tables

        return tables.open_table(path, None if root is None else checks.folder("root", root), classnames)
    if path.is_file() and ending == ".tar":
        from . import tars

        return tars.open_tars([path], path.parent, classnames)
    if path.exists():
        raise ValueError(f"name: expected a folder, or a .csv, .parquet or .tar file, got {written!r}")
    names = ", ".join(SETS)
    raise ValueError(
        f"name: expected the path of a folder, a .csv, .parquet or .tar, or one of {names}; got {written!r}"
    )
