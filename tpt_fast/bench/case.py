"""One model and one number of classes: whole images by tpt_fast and by the published algorithm, as things to call.

Weights are random, for speed does not depend on them. "Published" is the algorithm written plainly in PyTorch, with its
PIL views for a photograph, without for given views; in half precision it runs by autocast, as its authors' code does.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Any, NamedTuple

import open_clip
import torch
from open_clip.zero_shot_metadata import IMAGENET_CLASSNAMES
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode, register_flop_formula

from .._machine import free_bytes
from .._stages import Stages
from ..config import TuneConfig
from ..demo import PHOTO_FOLDER
from ..methods.published import Outcome, pil_views, tpt
from ..models import read
from ..models.weights import PRECISIONS
from ..result import TuneResult
from ..stream import Prepared
from ..tuner import Tuner
from .rates import synchronize
from .rows import digits

STARTS = ("a photograph", "given views")  #: what one image may begin with
MODES = ("batch", "stream")  #: how many images may be given


@register_flop_formula(torch.ops.tpt_fast.linear)
def _linear_flops(
    x_shape: Any, panels_shape: Any, bias_shape: Any, width: int, activation: int, *, out_shape: Any = None
) -> int:
    return 2 * math.prod(x_shape) * width


class RandomModel(NamedTuple):
    """One of open_clip's models with seeded random weights."""

    name: str
    model: Any
    tokenizer: Callable

    @classmethod
    def of(cls, name: str, device: torch.device) -> RandomModel:
        """Without a download, where open_clip's configuration of the model needs none."""
        torch.manual_seed(0)
        disabled = logging.root.manager.disable
        logging.disable(logging.WARNING)  # that there are no weights is no news
        try:
            model = open_clip.create_model(name, device=device, pretrained_hf=False)
        finally:
            logging.disable(disabled)
        model = model.eval().requires_grad_(False)
        model.logit_scale.fill_(math.log(100))  # where training ends
        return cls(name, model, open_clip.get_tokenizer(name))


class Case:
    """A model with the first ``classes`` of ImageNet's names, in "fp32", "fp16" or "bf16".

    Raises:
        TypeError, ValueError: what :class:`~tpt_fast.Tuner` says of the model.
    """

    def __init__(self, random: RandomModel, classes: int, precision: str = "fp32") -> None:
        self.random, self.precision = random, precision
        self.names = IMAGENET_CLASSNAMES[:classes]
        # Both sides draw the same views then. With fp16 it would also be the published loop, which is the peer.
        self.tuner = self._tuner(strict_official=precision != "fp16")
        self.device = self.tuner.device
        self.photo = Image.open(PHOTO_FOLDER / "temple.jpg").convert("RGB").resize((500, 375))  # as most of ImageNet's
        torch.manual_seed(0)
        self.views = pil_views(self.photo, 64, self.tuner.preprocessing).to(self.device)

    def title(self, what: str) -> str:
        """What a row calls this case with one of :data:`STARTS`, or with so many images."""
        title = f"{self.random.name}, {len(self.names)} classes, {what}"
        return title if self.precision == "fp32" else f"{title}, {self.precision}"

    def ours(self, start: str) -> Callable[[], TuneResult]:
        """One image by the Tuner."""

        def run() -> TuneResult:
            torch.manual_seed(0)
            return self.tuner(self.photo) if start == "a photograph" else self.tuner.tune_views(self.views)

        return run

    def published(self, start: str) -> Callable[[], Outcome]:
        """One image by the published algorithm."""
        image = self.photo if start == "a photograph" else self.views

        def run() -> Outcome:
            torch.manual_seed(0)
            with torch.autocast(self.device.type, self.dtype, enabled=self.precision != "fp32"):
                outcome = tpt(self.random.model, image, self.names, self.random.tokenizer)
            synchronize(self.device)
            return outcome

        return run

    def many(self, mode: str, images: int) -> Callable[[], list[TuneResult]]:
        """``images`` photographs that differ in size, as a batch or as a stream."""
        photos = [self.photo.resize((500 - 20 * (i % 16), 375)) for i in range(images)]
        tuner = self._usual_tuner
        return lambda: tuner.tune_batch(photos) if mode == "batch" else list(tuner.map(photos))

    @property
    def dtype(self) -> torch.dtype:
        return PRECISIONS[self.precision]

    def unpublished(self) -> str | None:
        """Why the published algorithm cannot run here, or None if it can.

        Its graph keeps every token of every prompt: measured on ViT-B/32 in float32, 14 to 16 rows of the tower's
        width a block, by autocast 12.
        """
        family = read(self.random.model)
        if reason := family.not_causal():
            return reason
        rows, width = len(self.names) * family.context_length * family.depth, family.embedding.embedding_dim
        needed, free = 4 * 16 * rows * width, free_bytes(self.device)
        fits = needed < 0.8 * free
        return None if fits else f"it needs about {needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free"

    @torch.no_grad()
    def stages(self, start: str) -> tuple[dict[str, float], int]:
        """Each stage's part of one image's time, run eagerly, and the operations of its matrix products.

        The latter are those that the Tuner's way leaves to do, as torch counts them: on a CPU without attention's.
        """
        photo = start == "a photograph"
        prepared = self.tuner.prepare(self.photo) if photo else Prepared(self.views, {})
        with FlopCounterMode(display=False) as counted:
            self.tuner.run(self.tuner.classes, prepared.views[None], Stages())
        taken = _Waiting(self.device)
        for _ in range(3 if self.device.type == "cuda" else 1):  # a CPU's whole image is long
            if photo:
                with taken("load and views"):
                    prepared = self.tuner.prepare(self.photo)
            self.tuner.run(self.tuner.classes, prepared.views[None], taken)
        total = sum(taken.seconds.values())
        return {stage: seconds / total for stage, seconds in taken.seconds.items()}, counted.get_total_flops()

    def facts(self, start: str, median: float, rate: float) -> dict[str, Any]:
        """What a row of ours says beside its times.

        Args:
            median: seconds of one image.
            rate: operations a second of the machine, measured in the same run. ``over_floor`` is how many times longer
                the image took than its matrix products would at that rate.
        """
        shares, flops = self.stages(start)
        return {
            "shares": {stage: round(share, 4) for stage, share in shares.items()},
            "gflops": digits(flops / 1e9),
            "matrix_gflops": round(rate / 1e9),
            "over_floor": round(median * rate / flops, 3),
            "held_mb": round(self.tuner.memory().own / 1e6),
        }

    def _tuner(self, **options: Any) -> Tuner:
        config = TuneConfig(precision=self.precision, **options)
        return Tuner(self.random.model, self.names, config, tokenizer=self.random.tokenizer)

    @cached_property
    def _usual_tuner(self) -> Tuner:
        """As users have it: a strict one draws its views one image after another, in one thread."""
        return self._tuner()


class _Waiting(Stages):
    """Stages that end when the device has done their work."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self._device = device

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        with super().__call__(name):
            yield
            synchronize(self._device)
