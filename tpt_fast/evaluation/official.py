"""Test images and names from the files that the authors of the data sets publish.

The paths are those of CoOp's split files, and so are the names; both are checked against digests of these.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

Files = dict[str, Path]
Found = tuple[Iterable[tuple[str, int]], list[str]]


def _lines(path: Path) -> list[str]:
    return [line.strip() for line in path.read_text("utf-8").splitlines() if line.strip()]


def _pets(files: Files) -> Found:
    """``Abyssinian_201 1 1 1``: the class, from 1, is the second."""
    rows = [(f"{name}.jpg", int(label) - 1) for name, label, *_ in map(str.split, _lines(files["test.txt"]))]
    names = {label: path.rpartition("_")[0].lower() for path, label in rows}
    return rows, [names[i] for i in sorted(names)]


def _cars(files: Files) -> Found:
    load = _loadmat("cars")
    names = [_year_first(str(each)) for each in load(files["cars_meta.mat"])["class_names"]]
    annotations = load(files["cars_test_annos_withlabels.mat"])["annotations"]
    return [(f"cars_test/{each['fname']}", int(each["class"]) - 1) for each in annotations], names


def _year_first(name: str) -> str:
    rest, _, year = name.rpartition(" ")
    return f"{year} {rest}"


def _ucf101(files: Files) -> Found:
    """``1 ApplyEyeMakeup`` and ``ApplyEyeMakeup/v_ApplyEyeMakeup_g01_c01.avi``; a middle frame of each is an image."""
    classes = [line.split() for line in _lines(files["classInd.txt"])]
    label_of = {name: int(number) - 1 for number, name in classes}
    folder_of = {name: "_".join(re.findall(r"[A-Z][^A-Z]*", name)) for name in label_of}
    rows = []
    for line in _lines(files["testlist01.txt"]):
        name, video = line.split()[0].split("/")
        rows.append((f"{folder_of[name]}/{video.rpartition('.')[0]}.jpg", label_of[name]))
    return rows, [folder_of[name] for name in sorted(label_of, key=label_of.__getitem__)]


def _sun397(files: Files) -> Found:
    """``/a/apse/indoor`` is class "indoor apse"; the paths begin with a stroke too."""
    folders = [line.strip("/") for line in _lines(files["ClassName.txt"])]
    label_of = {folder: i for i, folder in enumerate(folders)}
    paths = [line.strip("/") for line in _lines(files["Testing_01.txt"])]
    rows = [(path, label_of[path.rpartition("/")[0]]) for path in paths]
    return rows, [" ".join(reversed(folder.split("/")[1:])) for folder in folders]


def _aircraft(files: Files) -> Found:
    names = _lines(files["variants.txt"])
    label_of = {name: i for i, name in enumerate(names)}
    rows = [line.split(" ", 1) for line in _lines(files["images_variant_test.txt"])]
    return [(f"{image}.jpg", label_of[name]) for image, name in rows], names


def _food101(files: Files) -> Found:
    """Names sorted: ``classes.txt`` has "cheesecake" before "cheese_plate"."""
    names = sorted(_lines(files["classes.txt"]))
    label_of = {name: i for i, name in enumerate(names)}
    return [(f"{line}.jpg", label_of[line.split("/")[0]]) for line in _lines(files["test.txt"])], names


def _dtd(files: Files) -> Found:
    paths = _lines(files["test1.txt"])
    names = sorted({path.split("/")[0] for path in paths})
    label_of = {name: i for i, name in enumerate(names)}
    return [(path, label_of[path.split("/")[0]]) for path in paths], names


def _flowers102(files: Files) -> Found:
    from torchvision.datasets import Flowers102

    load = _loadmat("flowers102")
    labels = load(files["imagelabels.mat"])["labels"]
    images = [int(number) for number in load(files["setid.mat"])["tstid"]]
    names = [name.rstrip("?") for name in Flowers102.classes]  # one of them is "pink-yellow dahlia?"
    return [(f"image_{number:05}.jpg", int(labels[number - 1]) - 1) for number in images], names


def _loadmat(name: str) -> Callable[[Path], Any]:
    try:
        from scipy.io import loadmat
    except ImportError as error:
        raise ImportError(
            f"{name}: its authors' labels are MATLAB files, which need scipy (pip install scipy); "
            "CoOp's split file does without"
        ) from error
    return lambda path: loadmat(str(path), squeeze_me=True)


#: The files that each is made of.
NEEDED: dict[str, tuple[str, ...]] = {
    "pets": ("test.txt",),
    "cars": ("cars_meta.mat", "cars_test_annos_withlabels.mat"),
    "ucf101": ("classInd.txt", "testlist01.txt"),
    "sun397": ("ClassName.txt", "Testing_01.txt"),
    "aircraft": ("variants.txt", "images_variant_test.txt"),
    "food101": ("classes.txt", "test.txt"),
    "dtd": ("test1.txt",),
    "flowers102": ("imagelabels.mat", "setid.mat"),
}

OFFICIAL: dict[str, Callable[[Files], Found]] = {
    "pets": _pets,
    "cars": _cars,
    "ucf101": _ucf101,
    "sun397": _sun397,
    "aircraft": _aircraft,
    "food101": _food101,
    "dtd": _dtd,
    "flowers102": _flowers102,
}
