"""CLIP as it is (Radford et al., ICML 2021)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from .._stages import Stages
from ..text.classes import Classes
from . import Answer, Method


@dataclass(frozen=True)
class ZeroShot(Method):
    """The plain image and the one prompt of ctx_init: what the others start from."""

    name: ClassVar[str] = "zero_shot"
    paper: ClassVar[str] = "Radford et al., ICML 2021"
    tunes: ClassVar[str] = "nothing"
    gradient: ClassVar[str] = "none"

    def __call__(self, images: Tensor, classes: Classes, stages: Stages) -> Answer:
        logits = zero_shot(images, classes)
        return Answer(logits, logits)


def zero_shot(images: Tensor, classes: Classes) -> Tensor:
    """Logits [B, C] of view 0 of [B, N, D] with the prompt of ctx_init."""
    return classes.logits(classes.scaled(images[:, :1]), classes.text.initial()[0])[:, 0]
