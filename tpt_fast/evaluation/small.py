"""CIFAR and Tiny ImageNet: small images, for tests and for the demo model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from . import checks
from .folders import names_of
from .sets import Files, ImageSet, Rows

_TINY_VALIDATION, _TINY_PACKED, _TINY_CLASSES = 10_000, 5_000, 200


def open_small(name: str, root: Path) -> ImageSet:
    if name.startswith("cifar"):
        return _cifar(name, root)
    return _tiny_imagenet(name, root)


class Pixels:
    """Images in memory, uint8 [N, H, W, 3]."""

    def __init__(self, pixels: np.ndarray) -> None:
        self.pixels = pixels

    def __call__(self, i: int, id: str) -> np.ndarray:
        return self.pixels[i]


class Packed:
    """Files one after the other in one array."""

    def __init__(self, content: np.ndarray, begins: np.ndarray, chosen: np.ndarray) -> None:
        self.content, self.begins, self.chosen = content, begins, chosen

    def __call__(self, i: int, id: str) -> bytes:
        at = self.chosen[i]
        return self.content[self.begins[at] : self.begins[at + 1]].tobytes()


def _cifar(name: str, root: Path) -> ImageSet:
    """The test images, as torchvision reads them; nothing is downloaded."""
    try:
        from torchvision import datasets
    except ImportError as error:
        raise ImportError(f"{name}: needs torchvision ({error})") from error
    try:
        found = (datasets.CIFAR10 if name == "cifar10" else datasets.CIFAR100)(str(root), train=False)
    except RuntimeError as error:
        raise FileNotFoundError(f"{name}: torchvision finds none in {root} ({error})") from error
    checks.image_count(name, len(found.data), 10_000, root)
    rows = Rows()
    for i, label in enumerate(found.targets):
        rows.add(f"test/{i:05}", label, found.data[i].nbytes)
    return rows.to_set(name, found.classes, Pixels(found.data))


def _tiny_imagenet(name: str, root: Path) -> ImageSet:
    """The validation images of ``tiny-imagenet-200`` as it is downloaded, or packed in ``tiny_imagenet_val.npz``."""
    packed = root / "tiny_imagenet_val.npz"
    folder = next((each for each in (root, root / "tiny-imagenet-200") if (each / "wnids.txt").is_file()), None)
    if folder is None and not packed.is_file():
        raise FileNotFoundError(f"{name}: expected tiny-imagenet-200 or {packed.name} in {root}")
    if folder is None:
        return _packed(name, packed)
    known = (folder / "wnids.txt").read_text().split()
    if len(known) != _TINY_CLASSES or len(set(known)) != len(known):
        raise ValueError(f"{name}: expected {_TINY_CLASSES} classes, found {len(set(known))} in {folder / 'wnids.txt'}")
    lines = [line.split("\t") for line in (folder / "val" / "val_annotations.txt").read_text().splitlines()]
    checks.image_count(name, len(lines), _TINY_VALIDATION, folder / "val" / "val_annotations.txt")
    checks.classes(name, {wnid for _, wnid, *_ in lines}, known, folder / "val" / "val_annotations.txt")
    wnids, classnames = _classes(name, sorted(known), _words(folder / "words.txt"))
    label_of = {wnid: i for i, wnid in enumerate(wnids)}
    rows, missing = Rows(), []
    for file, wnid, *_ in lines:
        path = folder / "val" / "images" / file
        if wnid not in label_of:
            continue
        if path.is_file():
            rows.add(f"val/images/{file}", label_of[wnid], path.stat().st_size)
        else:
            missing.append(file)
    checks.files(name, missing, len(lines), folder / "val" / "images")
    return rows.to_set(name, classnames, Files(str(folder)))


def _packed(name: str, path: Path) -> ImageSet:
    with np.load(path) as file:
        content, begins, places = file["webp"], file["offsets"], file["labels"]
        known = [str(each) for each in file["wnids"]]
        words = dict(zip(known, map(str, file["classnames"])))
    checks.image_count(name, len(places), _TINY_PACKED, path)
    wnids, classnames = _classes(name, known, words)
    label_of = np.full(len(known), -1)
    label_of[[known.index(wnid) for wnid in wnids]] = np.arange(len(wnids))
    labels = label_of[places]
    chosen = np.flatnonzero(labels >= 0)
    rows = Rows()
    for at in chosen:
        rows.add(f"{at:05}.webp", int(labels[at]), int(begins[at + 1] - begins[at]))
    note = f"{path.name}: {_TINY_PACKED:,} of the {_TINY_VALIDATION:,} validation images, compressed again"
    return rows.to_set(f"{name}-packed", classnames, Packed(content, begins, chosen), notes=[note])


def _classes(name: str, known: Sequence[str], words: dict[str, str]) -> tuple[Sequence[str], tuple[str, ...]]:
    """All, or those of the demo model under the names that it was trained with."""
    if name == "tiny-imagenet-demo":
        from ..demo import CLASSNAMES, WNIDS

        checks.classes(name, set(known) & set(WNIDS), WNIDS, "Tiny ImageNet")
        return WNIDS, CLASSNAMES
    return known, tuple(words[wnid] for wnid in known) if words else names_of(known)


def _words(path: Path) -> dict[str, str]:
    """The first synonym of each WordNet id."""
    if not path.is_file():
        return {}
    lines = (line.split("\t") for line in path.read_text("utf-8").splitlines())
    return {wnid: words.split(",")[0] for wnid, words in lines}
