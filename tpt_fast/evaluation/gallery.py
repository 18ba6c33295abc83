"""Images whose answer a method changed: what it was, what it became, and the views that changed it."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from ..views.decode import UNREADABLE, load_image
from ..views.make import make_views
from . import rows
from .answers import ZERO_SHOT
from .run import image_seed

if TYPE_CHECKING:
    from .report import SetReport
    from .sets import ImageSet

KINDS = ("corrected", "spoilt", "still wrong")
MOST = 12  #: of a kind and method
_SHOWN = 6  # of the views that were kept
_PLAIN, _VIEW = 128, 72  # pixels


@dataclass
class Changed:
    """One image."""

    id: str
    kind: str  #: of :data:`KINDS`
    label: str
    before: str
    before_prob: float
    after: str
    after_prob: float
    entropy_before: float | None
    entropy_after: float | None
    entropies: list[float]  #: of all views, in nats; empty of a method that has none
    selected: list[int]
    plain: str = ""  #: view 0 as a data URL; empty where the image cannot be had
    views: list[tuple[str, float]] | None = None  #: some of the kept views, with their entropies

    @property
    def order(self) -> list[int]:
        """Views, ascending in entropy."""
        return sorted(range(len(self.entropies)), key=self.entropies.__getitem__)


def changed(of_set: SetReport, method: str, images: ImageSet | None) -> Iterator[Changed]:
    """Of a method's first seed, by kind, the most confident answers first."""
    folder, names = of_set.folder / "rows", of_set.about["classnames"]
    seed = min(next(each.seeds for each in of_set.methods if each.label == method))
    after, before = rows.read(folder, method, seed), rows.read(folder, ZERO_SHOT, seed)
    _, here, there = np.intersect1d(after.image, before.image, assume_unique=True, return_indices=True)
    differ = (after.prediction[here] != before.prediction[there]) & ~after.failed[here] & ~before.failed[there]
    here, there = here[differ], there[differ]
    kind = np.where(after.right[here], 0, np.where(before.right[there], 1, 2))
    for number, name in enumerate(KINDS):
        of_kind = np.flatnonzero(kind == number)
        of_kind = of_kind[np.argsort(-after.confidence[here[of_kind]], kind="stable")][:MOST]
        chosen = rows.some(folder, method, seed, after.image[here[of_kind]])
        for each in of_kind:
            row, was = chosen[int(after.image[here[each]])], there[each]
            made = Changed(
                id=row["id"],
                kind=name,
                label=names[row["label"]],
                before=names[before.prediction[was]],
                before_prob=float(before.confidence[was]),
                after=names[row["prediction"]],
                after_prob=row["confidence"],
                entropy_before=row["entropy_before"],
                entropy_after=row["entropy_after"],
                entropies=row["entropies"] or [],
                selected=row["selected"] or [],
            )
            if images is not None:
                _add_pictures(made, images, row["image"], of_set.about, seed)
            yield made


def _add_pictures(made: Changed, images: ImageSet, image: int, about: dict[str, Any], seed: int) -> None:
    try:
        pixels = load_image(images.image(image))
    except UNREADABLE:  # it is not there any more
        return
    options, plain = about["options"], {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}
    views = make_views(
        pixels,
        options["n_views"],
        seed=image_seed(seed, made.id),
        views=options.get("views", "crops"),
        **{**about["model"]["preprocessing"], **plain},
    )
    made.plain = _data_url(views[0], _PLAIN)
    if len(made.entropies) == len(views):
        made.views = [(_data_url(views[i], _VIEW), made.entropies[i]) for i in made.selected[:_SHOWN]]


def _data_url(view: Tensor, size: int) -> str:
    from PIL import Image

    pixels = (view.permute(1, 2, 0).clamp(0, 1) * 255).round().byte().numpy()
    picture, file = Image.fromarray(pixels), io.BytesIO()
    picture.thumbnail((size, size), Image.Resampling.BICUBIC)
    picture.save(file, "JPEG", quality=85)
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"
