"""MTA (Zanella and Ben Ayed, CVPR 2024): the mode of the views' features, with how much each view belongs to it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from .._checks import check_integer, check_number
from .._fields import described
from .._stages import Stages
from ..text.classes import Classes
from . import Answer, Method
from .zero_shot import zero_shot

INNER, MOVED = 5, 1e-6  # steps of each half of a round at most, and how little a last step moves
NEIGHBOURS = 0.3  # of the other views


@dataclass(frozen=True)
class Mta(Method):
    """Mean shift over the features of all views, weighted by an inlierness that is found along with the mode."""

    name: ClassVar[str] = "mta"
    paper: ClassVar[str] = "Zanella and Ben Ayed, CVPR 2024"
    tunes: ClassVar[str] = "nothing"
    gradient: ClassVar[str] = "none"

    lambda_y: float = described("Temperature of the inlierness, above 0. Paper: 0.2.", 0.2)
    lambda_q: float = described("How much views of like predictions keep together, 0 or more. Paper: 4.", 4.0)
    rounds: int = described("Of inlierness and mode in turn, 1 or more. Published code: 5.", 5)

    def __post_init__(self) -> None:
        check_number("lambda_y", self.lambda_y, "a number above 0", lambda v: v > 0)
        check_number("lambda_q", self.lambda_q, "a number of 0 or more", lambda v: v >= 0)
        check_integer("rounds", self.rounds, 1)

    def check(self, n_views: int) -> None:
        if _neighbours(n_views) < 1:
            raise ValueError(f"n_views: expected 5 or more with method 'mta', got {n_views}")

    def __call__(self, images: Tensor, classes: Classes, stages: Stages) -> Answer:
        features = classes.text.initial()[0]
        before = classes.logits(classes.scaled(images), features)
        with stages("mean shift"):
            probs = before.softmax(-1)
            found = self.shift(images, bandwidths(images), probs @ probs.mT)
        logits = classes.logits(classes.scaled(found.mode.unsqueeze(1)), features)[:, 0]
        return Answer(logits, zero_shot(images, classes), extra=found._asdict())

    def shift(self, images: Tensor, bandwidth: Tensor, affinity: Tensor) -> Mode:
        """See :class:`Mode`.

        Args:
            images: [B, N, D] of length 1; the mode starts from view 0.
            bandwidth: [B, N], each view's own h^2.
            affinity: [B, N, N] of their predictions, the diagonal included.
        """

        def density(mode: Tensor) -> Tensor:
            return ((images - mode.unsqueeze(1)).square().sum(-1) / (-2 * bandwidth)).exp()

        mode = images[:, 0]
        inlierness = torch.full_like(bandwidth, 1 / images.shape[1])
        for _ in range(self.rounds):
            kernel = density(mode)
            moving = torch.ones_like(kernel[:, :1], dtype=torch.bool)
            for _ in range(INNER):
                like = (affinity @ inlierness.unsqueeze(-1)).squeeze(-1)
                after = ((kernel + self.lambda_q * like) / self.lambda_y).softmax(-1)
                inlierness, moving = _advance(inlierness, after, moving)
            moving = torch.ones_like(moving)
            for _ in range(INNER):
                weights = (density(mode) * inlierness).unsqueeze(1)
                after = (weights @ images).squeeze(1) / weights.sum(-1)
                mode, moving = _advance(mode, after / after.norm(dim=-1, keepdim=True), moving)
        return Mode(inlierness, mode)


class Mode(NamedTuple):
    """What a mean shift ends at."""

    inlierness: Tensor  #: [B, N], of sum 1
    mode: Tensor  #: [B, D], of length 1


def bandwidths(images: Tensor) -> Tensor:
    """[B, N] of views [B, N, D]: half the mean squared distance to the nearest others."""
    distance = (2 - 2 * images @ images.mT).clamp_min(0)
    itself = torch.eye(images.shape[1], dtype=torch.bool, device=images.device)
    nearest = distance.masked_fill(itself, torch.inf).topk(_neighbours(images.shape[1]), largest=False)
    return 0.5 * nearest.values.mean(-1)


def _neighbours(n_views: int) -> int:
    return int(NEIGHBOURS * (n_views - 1))


def _advance(before: Tensor, after: Tensor, moving: Tensor) -> tuple[Tensor, Tensor]:
    """The next value where it still moves, and whether it goes on moving."""
    moved = (after - before).norm(dim=-1, keepdim=True) >= MOVED
    return torch.where(moving, after, before), moving & moved
