"""Features of views, kept on disk: what the image tower and the image files are read for, once.

A folder holds a folder for each key: the weights, their precision, how views are made, the seed and the images. In it
are shards, safetensors files that are whole or absent, which any number of processes write and read through maps.
"""

from __future__ import annotations

import hashlib
import json
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from .._files import atomic_write

SHARD_BYTES = 64 << 20  #: a shard is written when it has so much

_ERRORS = "errors"


class Features:
    """The features of one key.

    Args:
        folder: of all keys; made if it is missing.
        key: what features depend on, as JSON holds it.
        images: how many there are in the set.

    Raises:
        ValueError: a file there is none of ours.
        OSError: the folder cannot be made or read.
    """

    def __init__(self, folder: Path, key: Mapping[str, Any], images: int) -> None:
        text = json.dumps(key, indent=1, sort_keys=True)
        self.folder = folder / hashlib.sha256(text.encode()).hexdigest()[:24]
        self.folder.mkdir(parents=True, exist_ok=True)
        if not (self.folder / "key.json").exists():  # for people; the folder's name is what counts
            with atomic_write(self.folder / "key.json") as aside:
                aside.write_text(f"{text}\n", "utf-8")
        self._shard = np.full(images, -1, np.int32)  # of each image, where it is
        self._row = np.zeros(images, np.int32)
        self._errors: dict[int, str] = {}
        self._open: list[Any] = []
        for path in sorted(self.folder.glob("shard-*.safetensors")):
            self._read(path)
        self._waiting: list[tuple[int, Tensor]] = []
        self._broken: dict[int, str] = {}

    def _read(self, path: Path) -> None:
        try:
            shard = safe_open(path, framework="pt")
            where = shard.get_tensor("images").numpy()
            errors = json.loads(shard.metadata()[_ERRORS])
        except Exception as error:  # whatever safetensors raises
            raise ValueError(f"features: {path} holds no features ({error}); take it away to have them made") from error
        if len(where) and where.max() >= len(self._shard):
            raise ValueError(f"features: {path} has image {where.max()} of a set of {len(self._shard)}")
        self._shard[where], self._row[where] = len(self._open), np.arange(len(where))
        self._errors |= {int(image): message for image, message in errors.items()}
        self._open.append(shard.get_slice("features") if len(where) else None)

    def __len__(self) -> int:
        """How many images there are features or an error of."""
        return int((self._shard >= 0).sum()) + len(self._errors)

    def __contains__(self, image: int) -> bool:
        return self._shard[image] >= 0 or image in self._errors

    def get(self, image: int) -> Tensor | str | None:
        """Features [N, D] of an image by its index, why there are none, or None where it has not been tried."""
        if self._shard[image] >= 0:
            row = int(self._row[image])
            return self._open[self._shard[image]][row : row + 1][0]
        return self._errors.get(image)

    def add(self, image: int, features: Tensor | str) -> None:
        """Keep features [N, D], float32 on any device, or why there are none; on disk after :meth:`write`."""
        if isinstance(features, str):
            self._broken[image] = features
        else:
            self._waiting.append((image, features.cpu()))

    @property
    def waiting_bytes(self) -> int:
        return sum(features.nbytes for _, features in self._waiting[:1]) * len(self._waiting)

    def write(self) -> None:
        """Have what was added on the disk, as one shard."""
        if not self._waiting and not self._broken:
            return
        tensors = {"images": torch.tensor([image for image, _ in self._waiting], dtype=torch.int64)}
        if self._waiting:
            tensors["features"] = torch.stack([features for _, features in self._waiting])
        path = self.folder / f"shard-{secrets.token_hex(8)}.safetensors"
        with atomic_write(path) as aside:
            save_file(tensors, aside, {_ERRORS: json.dumps(self._broken)})
        self._waiting.clear()
        self._broken.clear()
        self._read(path)


def weights_digest(model: nn.Module) -> str:
    """Of all that a model has learned: names, types, shapes and bytes."""
    digest = hashlib.blake2b(digest_size=16)
    for name, value in sorted(model.state_dict().items()):
        if isinstance(value, Tensor):
            digest.update(f"{name} {value.dtype} {list(value.shape)}\n".encode())
            flat = value.detach().cpu().contiguous().reshape(-1)
            digest.update(flat.view(torch.uint8).numpy().data if flat.numel() else b"")
    return digest.hexdigest()
