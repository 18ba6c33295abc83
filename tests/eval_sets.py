"""Image sets for tests of runs: photographs of the demo, one of them broken."""

import hashlib
import io
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
from PIL import Image

from tpt_fast import demo


@lru_cache
def jpegs(count: int) -> tuple[bytes, ...]:
    """Parts of the demo's photographs."""
    made = []
    for i in range(count):
        file = [*demo.PHOTOS][i % len(demo.PHOTOS)]
        with Image.open(demo.PHOTO_FOLDER / file) as photo:
            width, height = photo.size
            begin = (i // len(demo.PHOTOS)) * 7
            part = photo.convert("RGB").crop((begin, begin, width - begin, height - 3)).resize((80 + i, 72))
        out = io.BytesIO()
        part.save(out, "JPEG")
        made.append(out.getvalue())
    return tuple(made)


@dataclass
class Photos:
    """What the evaluation asks of an image set, over photographs in memory; counts what is read."""

    count: int
    broken: tuple[int, ...] = ()
    name: str = "photos"
    classnames: tuple[str, ...] = demo.CLASSNAMES
    templates: tuple[str, ...] = ("a photo of a {}.",)
    notes: tuple[str, ...] = ("made for a test",)
    read: list[int] = field(default_factory=list)

    @property
    def digest(self) -> str:
        return hashlib.sha256(f"{self.count} {self.broken}".encode()).hexdigest()

    @property
    def labels(self) -> np.ndarray:
        return np.array([self.label(i) for i in range(self.count)])

    def __len__(self) -> int:
        return self.count

    def id(self, i: int) -> str:
        return f"{i:04}.jpg"

    def label(self, i: int) -> int:
        return demo.CLASSNAMES.index([*demo.PHOTOS.values()][i % len(demo.PHOTOS)])

    def image(self, i: int) -> bytes:
        self.read.append(i)
        return b"no image" if i in self.broken else jpegs(self.count)[i]
