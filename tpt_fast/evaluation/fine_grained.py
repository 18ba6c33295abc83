"""The ten fine-grained sets: images, labels and names of CoOp's split files, or of the data sets' own files."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from . import checks
from .known import Known
from .layout import find_file, locate, subfolders
from .official import NEEDED, OFFICIAL
from .sets import ImageSet, Rows

_EXCHANGED = (16, 17)  #: of Food101, whose code lists "cheesecake" before "cheese_plate"
_SPLITS_AT = "github.com/linzhiqiu/cross_modal_adaptation (splits/)"
_PROBES = 32  # images that a folder is known by


class Split(NamedTuple):
    """A part, mostly the test part: an image and its label a row, and the classes' names."""

    rows: list[tuple[str, int]]
    names: list[str]


class _Images:
    """Files below a folder, whose paths may lack a beginning that ids have."""

    def __init__(self, folder: Path, optional: str, replaced: bool) -> None:
        self.folder, self.optional, self.replaced = str(folder), optional, replaced

    def __call__(self, i: int, id: str) -> str:
        return os.path.join(self.folder, id[len(self.optional) :] if self.replaced else id)


def open_known(
    known: Known,
    root: Path,
    *,
    as_published: bool = False,
    subset: bool = False,
    splits: str | os.PathLike | None = None,
    official: bool = False,
    part: str = "test",
) -> ImageSet:
    notes: list[str] = []
    name, images = known.id, known.images
    file = None if official or known.split is None else _split_file(known, root, splits)
    if file is None and part != "test":
        of = "no split file of CoOp's" if known.split is None else f"{known.split[0]} (a copy is in {_SPLITS_AT})"
        raise FileNotFoundError(f"{known.id}: its training images are listed by {of}, which is not below {root}")
    if file is not None:
        split, recognised = _read_split(known, file, part)
        if not recognised:
            name += "-other-split"
            notes.append(
                f"{file} is not CoOp's file: what it tests on may be other images, and no published figure is of them"
            )
    else:
        split, source = _read_official(known, root)
        if known.other_images is not None:
            name, images = f"{known.id}-official", known.other_images
            notes.append(f"of {source}: {checks.OTHER_TEST_SET}")
        else:
            notes += [f"of the data set's own {source}"] if known.split else []
            if known.test and not subset and checks.test_digest(split.rows) != known.test:
                raise ValueError(f"{known.id}: the images or labels of {source} are not those of CoOp's file")
        file = Path(source)
    checks.names(known.id, split.names, known.classes, known.names, file)
    if part != "test":
        name += f"-{part}"
    elif not subset:
        checks.image_count(known.id, len(split.rows), images, file)
    classnames = list(split.names)
    if known.id == "food101" and as_published:
        i, j = _EXCHANGED
        classnames[i], classnames[j] = classnames[j], classnames[i]
        notes.append(f"classes {i} and {j}, {classnames[j]} and {classnames[i]}, are exchanged as in TPT's code")

    rows, source_of, note = _find_images(known, root, split, subset)
    if note:
        notes.append(note)
    if subset:
        name += "-subset"
        notes.append(f"a subset: {len(rows):,} of {images:,} images; no published figure is of it")
    return rows.to_set(name, classnames, source_of, templates=[known.template], notes=notes)


def _find_images(known: Known, root: Path, split: Split, subset: bool) -> tuple[Rows, _Images, str | None]:
    """Every image of the split on the disk, with its size."""
    step = 1 if subset else max(1, len(split.rows) // _PROBES)
    probes = [path for path, _ in split.rows[::step]]

    def sources(folder: Path) -> list[_Images]:
        return [
            _Images(folder, known.optional, replaced) for replaced in ((False, True) if known.optional else (False,))
        ]

    def share(folder: Path) -> float:
        there = max(sum(os.path.isfile(each(0, path)) for path in probes) for each in sources(folder))
        return there / len(probes)

    place = locate(known.id, root, known.folders, share, f"the images ({checks.some(probes, 2)})")
    source = max(sources(place.folder), key=lambda each: sum(os.path.isfile(each(0, path)) for path in probes))
    rows, missing = Rows(), []
    for path, label in split.rows:
        try:
            size = os.stat(source(0, path)).st_size
        except OSError:
            missing.append(path)
        else:
            rows.add(path, label, size)
    if not subset:
        checks.files(known.id, missing, len(split.rows), place.folder)
    return rows, source, place.note


# --- CoOp's split files


def _split_file(known: Known, root: Path, splits: str | os.PathLike | None) -> Path | None:
    """The one of CoOp if there are several; None if there is none."""
    assert known.split is not None
    if splits is not None:
        if os.path.isfile(splits):
            return Path(splits)
        around = [checks.folder("splits", splits)]
    else:
        around = [root, *(root / each for each in subfolders(root))]
        around += [each / name for each in around for name in ("data_splits", "data/data_splits", "splits")]
        around += [*root.parents[:2], Path("data/data_splits")]
    found = list(find_file([each for each in around if each.is_dir()], known.split))
    if splits is not None and not found:
        raise FileNotFoundError(f"{known.id}: expected {known.split[0]} in {splits}; a copy is in {_SPLITS_AT}")
    return next(
        (each for each in found if checks.blob_id(each.read_bytes()) == known.blob), found[0] if found else None
    )


def _read_split(known: Known, file: Path, part: str = "test") -> tuple[Split, bool]:
    """The split, and whether it is CoOp's: its very bytes, or its test part in other ones."""
    content = file.read_bytes()
    form = 'expected {"train": [[path, label, name], ...], "val": ..., "test": ...}'
    try:
        parts: Any = json.loads(content)
        listed = {
            part: [(str(path), int(label), str(name)) for path, label, name in rows] for part, rows in parts.items()
        }
        test, wanted = listed["test"], listed[part]
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{known.id}: {file} is no split file: {form} ({type(error).__name__}: {error})") from error
    names: dict[int, str] = {}
    for path, label, name in (row for part in listed.values() for row in part):
        if names.setdefault(label, name) != name:
            raise ValueError(f"{known.id}: {file} calls class {label} {names[label]!r} and, of {path}, {name!r}")
    if names.keys() != set(range(len(names))):
        raise ValueError(
            f"{known.id}: expected labels 0 to {len(names) - 1} in {file}, got {checks.some(sorted(names))}"
        )
    rows = [(path, label) for path, label, _ in test]
    recognised = checks.blob_id(content) == known.blob
    if not recognised and known.test is not None:
        recognised = checks.test_digest(rows) == known.test
    rows = [(path, label) for path, label, _ in wanted]
    return Split(rows, [names[i] for i in range(len(names))]), recognised


# --- the data sets' own files


def _read_official(known: Known, root: Path) -> tuple[Split, str]:
    """The test images that the data set's authors list."""
    needed: Sequence[str] = NEEDED.get(known.id, ())
    files: dict[str, Path] = {}
    around = _official_folders(root, known)
    for name in needed:
        if (found := next(find_file(around, [name]), None)) is not None:
            files[name] = found
    if not needed or len(files) < len(needed):
        looked = []
        if known.split is not None:
            looked.append(f"{known.split[0]} (a copy is in {_SPLITS_AT}) below {root} or in splits")
        if needed:
            lacking = [name for name in needed if name not in files]
            looked.append(f"the data set's own {', '.join(needed)} (not found: {', '.join(lacking)})")
        else:
            looked.append("the data set's authors have published no list of test images")
        raise FileNotFoundError(f"{known.id}: expected {'; or '.join(looked)}")
    read: Callable[[dict[str, Path]], tuple[Iterable[tuple[str, int]], list[str]]] = OFFICIAL[known.id]
    rows, names = read(files)
    return Split(list(rows), names), ", ".join(str(path) for path in files.values())


def _official_folders(root: Path, known: Known) -> list[Path]:
    """The data set's folders, the root where that is one, and those in them that its authors' files lie in."""
    tops = {relative.split("/")[0].lower() for relative in known.folders}
    own = [root / each for each in subfolders(root) if each.lower() in tops]
    near = own or [root, root.parent]
    deeper = [each / name for each in near for name in _OWN_FOLDERS]
    return [each for each in (*near, *deeper) if each.is_dir()]


_OWN_FOLDERS = ("annotations", "data", "meta", "labels", "dtd/labels", "devkit", "ucfTrainTestlist", "Partitions")
