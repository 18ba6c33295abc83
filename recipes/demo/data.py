"""CIFAR-10 as one uint8 array, from either of the two forms a user may have."""

from __future__ import annotations

import io
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from tpt_fast.demo import CLASSNAMES


class Split(NamedTuple):
    """``images`` uint8 [N, 32, 32, 3] and ``labels`` int64 [N], values 0..9 indexing ``CLASSNAMES``."""

    images: Tensor
    labels: Tensor


def load_split(root: str | Path, train: bool, download: bool = False) -> Split:
    """Read one split of CIFAR-10 into memory.

    ``root`` is either a folder with ``cifar10_train.npz`` / ``cifar10_test.npz`` (``jpeg`` uint8, all files one after
    another; ``offsets`` int64 [N + 1]; ``labels`` int64 [N]; ``classnames`` [10]) or a torchvision data root.

    Raises ``RuntimeError`` (from torchvision) when neither is there and ``download`` is false, and ``ValueError`` when
    the npz names its classes differently.
    """
    packed = Path(root) / f"cifar10_{'train' if train else 'test'}.npz"
    if packed.is_file():
        return _from_npz(packed)

    from torchvision.datasets import CIFAR10

    dataset = CIFAR10(str(root), train=train, download=download)
    return Split(torch.from_numpy(dataset.data), torch.tensor(dataset.targets))


def _from_npz(path: Path) -> Split:
    with np.load(path) as file:
        names = tuple(str(name) for name in file["classnames"])
        jpeg, offsets, labels = file["jpeg"], file["offsets"], file["labels"]
    if names != CLASSNAMES:
        raise ValueError(f"{path}: expected the classes {CLASSNAMES}, found {names}")
    images = np.empty((len(labels), 32, 32, 3), np.uint8)
    for i, (begin, end) in enumerate(pairwise(offsets.tolist())):
        images[i] = Image.open(io.BytesIO(jpeg[begin:end].tobytes())).convert("RGB")
    return Split(torch.from_numpy(images), torch.from_numpy(labels))
