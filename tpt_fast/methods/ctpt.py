"""C-TPT (Yoon et al., ICLR 2024): TPT whose class features stay dispersed, which keeps predictions calibrated."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .._checks import check_bool, check_number
from .._fields import described
from ..text.classes import Classes
from .tpt import Tpt


@dataclass(frozen=True)
class Ctpt(Tpt):
    """TPT, minus a multiple of how far the class features lie from their mean (ATFD)."""

    name: ClassVar[str] = "ctpt"
    paper: ClassVar[str] = "Yoon et al., ICLR 2024"

    lambda_term: float = described(
        "How much the dispersion of the class features counts. Published scripts: 50, of natural shifts 20.", 50.0
    )
    two_step: bool = described(
        "A first step on the entropy alone and a second one on the dispersion alone. Published code: off.", False
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("lambda_term", self.lambda_term, "a number of 0 or more", lambda v: v >= 0)
        check_bool("two_step", self.two_step)
        if self.two_step and self.steps == 1:
            object.__setattr__(self, "steps", 2)
        elif self.two_step and self.steps != 2:
            raise ValueError(f"steps: expected 1 or 2, one on each part of the loss, with two_step, got {self.steps}")

    def weights(self, step: int) -> tuple[float, float]:
        if self.two_step:
            return (1.0, 0.0) if step == 0 else (0.0, -self.lambda_term)
        return 1.0, -self.lambda_term

    def term(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """The mean Euclidean distance from the mean, which is not brought to length 1."""
        away = features - features.mean(-2, keepdim=True)
        distance = away.norm(dim=-1, keepdim=True)
        slope = away / (features.shape[-2] * distance.clamp_min(torch.finfo(distance.dtype).tiny))
        return distance.mean((-2, -1)), slope - slope.mean(-2, keepdim=True)

    def prepare(self, classes: Classes) -> None:
        at_least_two(self.name, classes)
        super().prepare(classes)


def at_least_two(method: str, classes: Classes) -> None:
    """Raise the ValueError of a class list that is too short for a term between classes."""
    if len(classes.names) < 2:
        raise ValueError(f"classnames: expected two or more with method {method!r}, whose term is between them, got 1")
