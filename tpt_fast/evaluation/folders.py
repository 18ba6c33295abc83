"""Sets that have a folder for each class: ImageNet and its kin, and any other."""

from __future__ import annotations

import csv
import importlib.util
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from . import checks
from .known import Known
from .layout import locate, subfolders
from .sets import Files, ImageSet, Rows

_WNID = re.compile(r"n\d{8}")
_SPLITS = {"train", "val", "valid", "validation", "test"}
_COMMON = _SPLITS | {"images", "data", "jpg"}  # names of folders that say nothing of what is in them
_DEPTH = 8  # of folders within a class; a link that leads back to one above would have no end


def open_known(known: Known, root: Path, *, subset: bool = False) -> ImageSet:
    """ImageNet, -A, -V2, -R or -Sketch: folders are WordNet ids, those of -V2 the numbers of the classes."""
    assert known.synsets is not None
    wnids, classnames = synsets(known.synsets), names_of(synsets(known.synsets))
    checks.names(known.id, classnames, known.classes, known.names, "open_clip")
    label_of = {wnid: label for label, wnid in enumerate(wnids)}

    def labels(folder: Path) -> dict[str, int | None]:
        """Of each sub-folder. Not its rank: "10" is before "2", and one that is missing would shift those behind."""
        inside = subfolders(folder)
        if known.id == "imagenet_v2" and not any(map(_WNID.fullmatch, inside)):
            return {each: int(each) if each.isdecimal() and int(each) < len(wnids) else None for each in inside}
        return {each: label_of.get(each) for each in inside}

    def share(folder: Path) -> float:
        if known.id == "imagenet" and _flat(folder):
            return 1.0
        found = labels(folder)
        common = len({label for label in found.values() if label is not None})
        return common / max(1, len(found) if subset else len(found) + len(wnids) - common)

    what = "folders 0 to 999" if known.id == "imagenet_v2" else f"{len(wnids):,} folders of WordNet ids (n01440764 ...)"
    place = locate(known.id, root, known.folders, share, what)
    notes = [place.note] if place.note else []
    rows = Rows()
    if known.id == "imagenet" and _flat(place.folder):
        wnid_of, file = _labels_of_flat(place.folder)
        notes.append(f"the labels of the flat folder {place.folder} are those of {file}")
        unknown = []
        for id, size in images(place.folder):
            if (wnid := wnid_of.get(id.partition(".")[0])) is None:
                unknown.append(id)
            else:
                rows.add(id, label_of[wnid], size)
        if unknown:
            raise ValueError(f"imagenet: {file} has no label of {len(unknown)} images: {checks.some(unknown)}")
    else:
        found = labels(place.folder)
        numbered = known.id == "imagenet_v2" and all(each.isdecimal() for each in found)
        folder_of = {label: each for each, label in found.items() if label is not None}
        expected = {folder_of.get(i, str(i) if numbered else wnid) for i, wnid in enumerate(wnids)}
        checks.classes(known.id, found, expected & found.keys() if subset else expected, place.folder)
        _add(rows, known.id, place.folder, sorted(folder_of.items()))
    if subset:
        notes.append(_subset_note(len(rows), known))
    else:
        checks.image_count(known.id, len(rows), known.images, place.folder)
    name = f"{known.id}-subset" if subset else known.id
    return rows.to_set(name, classnames, Files(str(place.folder)), templates=[known.template], notes=notes)


def _subset_note(found: int, known: Known) -> str:
    return f"a subset: {found:,} of {known.images:,} images; no published figure is of it"


def open_folder(path: Path, classnames: Sequence[str] | None = None) -> ImageSet:
    """A folder for each class, whose name is the class's, "_" for a space; WordNet ids are looked up.

    Args:
        classnames: names of all classes in label order, where the folders are "0", "1" ... or some of these names.
    """
    notes: list[str] = []
    folder, inside = path, subfolders(path)
    if len(inside) == 1 and not any(images(path, deep=False)) and len(subfolders(path / inside[0])) > 1:
        folder = path / inside[0]
        notes.append(f"root is a level off: the class folders are in {folder}")
        inside = subfolders(folder)
    name = path_name(folder)
    if len(inside) < 2:
        direct = "images directly in it" if any(images(folder, deep=False)) else "no images in it"
        raise ValueError(f"{name}: expected a folder for each class in {folder}, found {len(inside)} folders, {direct}")
    if all(each.lower() in _SPLITS for each in inside):
        raise ValueError(f"{name}: {', '.join(inside)} in {folder} are parts of a set and no classes: name one of them")
    numbered = all(each.isdecimal() for each in inside)
    if classnames is not None:
        names = tuple(classnames)
        if numbered:
            folder_of = {int(each): each for each in inside}
            if len(folder_of) != len(inside) or folder_of.keys() != set(range(len(names))):
                checks.classes(name, [str(i) for i in folder_of], [str(i) for i in range(len(names))], folder)
                raise ValueError(f"{name}: two folders of {folder} have one number")
        else:
            checks.classes(name, [_as_name(each) for each in inside], list(map(_as_name, names)), folder)
            place = {_as_name(each): each for each in inside}
            folder_of = {label: place[_as_name(each)] for label, each in enumerate(names)}
    elif numbered:
        raise ValueError(
            f"{name}: the folders of {folder} are numbers ({checks.some(inside, 3)}), which no image is described by: "
            "give classnames, or open imagenet_v2 by its name if it is that"
        )
    else:
        folder_of = dict(enumerate(inside))
        if all(map(_WNID.fullmatch, inside)):
            names = names_of(inside)
            notes.append(
                "the folders are WordNet ids: names are open_clip's for ImageNet's, of others their first word"
            )
        else:
            names = tuple(inside)
    rows = Rows()
    _add(rows, name, folder, sorted(folder_of.items()))
    return rows.to_set(name, names, Files(str(folder)), notes=notes)


def _as_name(folder: str) -> str:
    return folder.replace("_", " ")


def _add(rows: Rows, name: str, folder: Path, folders: Sequence[tuple[int, str]]) -> None:
    without = []
    for label, each in folders:
        before = len(rows)
        for id, size in images(folder / each, f"{each}/"):
            rows.add(id, label, size)
        if len(rows) == before:
            without.append(each)
    checks.empty(name, without, folder)


def images(folder: Path, prefix: str = "", *, deep: bool = True, depth: int = 0) -> Iterator[tuple[str, int]]:
    """Path and size of each image in a folder and those below, sorted by name; what is no image is passed over."""
    from ..views.decode import endings

    if depth > _DEPTH:
        raise ValueError(f"{folder}: more than {_DEPTH} folders deep; is there a link to a folder above?")
    with os.scandir(folder) as entries:
        shown = sorted((each for each in entries if not each.name.startswith(".")), key=lambda each: each.name)
    for entry in shown:
        if entry.is_dir():
            if deep and entry.name != "__MACOSX":
                yield from images(folder / entry.name, f"{prefix}{entry.name}/", depth=depth + 1)
        elif os.path.splitext(entry.name)[1].lower() in endings():
            yield f"{prefix}{entry.name}", entry.stat().st_size if entry.is_file() else 0


def path_name(path: Path) -> str:
    """A set's name from its path; what is called "val" or "3" has the name above it too."""
    parts = path.resolve().parts[1:] or (str(path),)
    begin = len(parts) - 1
    while begin and (parts[begin].lower() in _COMMON or parts[begin].isdecimal()):
        begin -= 1
    return "-".join(parts[begin:])


# --- names


def synsets(file: str) -> list[str]:
    """WordNet ids of one of timm's files, in the order of labels."""
    return _timm_lines(file)


def names_of(wnids: Sequence[str]) -> tuple[str, ...]:
    """The names that CLIP's authors gave ImageNet's classes; of other WordNet ids the first synonym."""
    from open_clip import IMAGENET_CLASSNAMES

    known = dict(zip(_timm_lines("imagenet_synsets.txt"), IMAGENET_CLASSNAMES, strict=True))
    if any(wnid not in known for wnid in wnids):
        lemmas = (line.partition("\t") for line in _timm_lines("imagenet_synset_to_lemma.txt"))
        known = {wnid: words.split(",")[0].strip().strip('"') for wnid, _, words in lemmas} | known
    if unknown := [wnid for wnid in wnids if wnid not in known]:
        raise ValueError(f"no names are known of the WordNet ids {checks.some(unknown)}")
    return tuple(known[wnid] for wnid in wnids)


def _timm_lines(file: str) -> list[str]:
    spec = importlib.util.find_spec("timm")  # open_clip needs it; importing it to read a text takes seconds
    if spec is None or not spec.submodule_search_locations:
        raise ImportError("ImageNet's classes are read from timm's files, and timm cannot be found: pip install timm")
    path = Path(spec.submodule_search_locations[0], "data", "_info", file)
    if not path.is_file():
        raise ImportError(f"timm has no {path}: expected timm 0.9 or newer")
    return path.read_text("utf-8").splitlines()


# --- ImageNet as its archive unpacks


def _flat(folder: Path) -> bool:
    """All images in one folder, which is not that of a class."""
    with os.scandir(folder) as entries:
        named = any(entry.name.startswith("ILSVRC2012_val_") for entry in entries)
    return named and not _WNID.fullmatch(folder.name)


def _labels_of_flat(folder: Path) -> tuple[dict[str, str], Path]:
    """WordNet ids of ImageNet's validation images by file name, from whichever file a user has."""
    listed = ("LOC_val_solution.csv", "imagenet_2012_validation_synset_labels.txt", "meta.bin")
    around = [folder, *folder.parents[:4]]
    for path in (above / file for file in listed for above in around):
        if not path.is_file():
            continue
        if path.suffix == ".csv":  # Kaggle's: ImageId,PredictionString
            with path.open(newline="") as file:
                return {row["ImageId"]: row["PredictionString"].split()[0] for row in csv.DictReader(file)}, path
        if path.suffix == ".txt":  # one a line, in the order of the images' numbers
            found = path.read_text().split()
        else:  # torchvision's, made of the devkit
            from torchvision.datasets.imagenet import load_meta_file

            found = load_meta_file(path.parent)[1]
        return {f"ILSVRC2012_val_{i:08}": wnid for i, wnid in enumerate(found, 1)}, path
    raise FileNotFoundError(
        f"imagenet: the images lie flat in {folder}, as the archive unpacks, without their classes; expected "
        f"{', '.join(listed)} beside or above it, or a folder for each WordNet id "
        "(torchvision.datasets.ImageNet(root, 'val') makes these of the archive and its devkit)"
    )
