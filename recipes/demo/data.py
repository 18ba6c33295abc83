"""Tiny ImageNet's images of the demo model's classes, from either of the two forms a user may have."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from tpt_fast.demo import WNIDS

SIDE = 64


class Split(NamedTuple):
    """``images`` uint8 [N, 64, 64, 3] and ``labels`` int64 [N], indices into the WordNet ids that were asked for."""

    images: Tensor
    labels: Tensor


def load_split(root: str | Path, train: bool, wnids: Sequence[str] = WNIDS) -> Split:
    """Read the images of ``wnids`` into memory; the other classes are left out.

    ``root`` is a folder ``tiny-imagenet-200`` as it is downloaded, or a folder with ``tiny_imagenet_train.npz`` and
    ``tiny_imagenet_val.npz`` (``webp`` uint8, all files one after another; ``offsets`` int64 [N + 1]; ``labels`` int64
    [N], places in ``wnids`` [200]). The two forms hold the same images in another order and of another compression.

    Raises:
        FileNotFoundError: neither is there.
        ValueError: a class is missing.
    """
    root = Path(root)
    packed = root / f"tiny_imagenet_{'train' if train else 'val'}.npz"
    if packed.is_file():
        return _from_npz(packed, wnids)
    if (root / "wnids.txt").is_file():
        return _from_folder(root, train, wnids)
    raise FileNotFoundError(f"{root}: expected {packed.name} or the files of tiny-imagenet-200 (wnids.txt, train, val)")


def hold_out(split: Split, count: int, seed: int) -> tuple[Split, Split]:
    """``split`` in a random order without ``count`` of its images, and those: what choices are made on."""
    order = torch.randperm(len(split.labels), generator=torch.Generator().manual_seed(seed))
    kept, held = order[count:], order[:count]
    return Split(split.images[kept], split.labels[kept]), Split(split.images[held], split.labels[held])


def _from_npz(path: Path, wnids: Sequence[str]) -> Split:
    with np.load(path) as file:
        webp, offsets, places = file["webp"], file["offsets"], file["labels"]
        known = [str(wnid) for wnid in file["wnids"]]
    _expect_all(wnids, known, path)
    label_of = np.full(len(known), -1)
    label_of[[known.index(wnid) for wnid in wnids]] = np.arange(len(wnids))
    labels = label_of[places]
    chosen = np.flatnonzero(labels >= 0)
    return _decoded(chosen, lambda i: io.BytesIO(webp[offsets[i] : offsets[i + 1]].tobytes()), labels[chosen])


def _from_folder(root: Path, train: bool, wnids: Sequence[str]) -> Split:
    _expect_all(wnids, (root / "wnids.txt").read_text().split(), root / "wnids.txt")
    label_of = {wnid: i for i, wnid in enumerate(wnids)}
    if train:
        files = [(file, wnid) for wnid in wnids for file in sorted((root / "train" / wnid / "images").glob("*.JPEG"))]
    else:
        lines = (root / "val" / "val_annotations.txt").read_text().splitlines()
        files = [(root / "val" / "images" / line.split("\t")[0], line.split("\t")[1]) for line in lines]
    files = [(file, label_of[wnid]) for file, wnid in files if wnid in label_of]
    return _decoded([file for file, _ in files], lambda file: file, np.array([label for _, label in files]))


def _decoded(items: Sequence, opened: Callable, labels: np.ndarray) -> Split:
    images = np.empty((len(items), SIDE, SIDE, 3), np.uint8)

    def decode(place: int) -> None:
        with Image.open(opened(items[place])) as image:
            images[place] = image.convert("RGB")

    with ThreadPoolExecutor() as pool:
        for _ in pool.map(decode, range(len(items))):
            pass
    return Split(torch.from_numpy(images), torch.from_numpy(labels))


def _expect_all(wnids: Sequence[str], known: Sequence[str], path: Path) -> None:
    if missing := [wnid for wnid in wnids if wnid not in known]:
        raise ValueError(f"{path}: expected Tiny ImageNet's classes, but {', '.join(missing)} are missing")
