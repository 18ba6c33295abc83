"""TPS (Sui et al., WACV 2025): class vectors are shifted instead of a context, so no text tower is in the loop."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .._checks import check_bool
from .._fields import described
from ..text.classes import Classes
from ..text.templates import Templates, read_templates
from .tpt import Tpt, Tuned


@dataclass(frozen=True)
class Tps(Tpt):
    """TPT's loss, lowered by a shift of each class vector; with several steps each chooses its views anew."""

    name: ClassVar[str] = "tps"
    paper: ClassVar[str] = "Sui et al., WACV 2025"
    tunes: ClassVar[str] = "a shift of each class vector"
    variable: ClassVar[str] = "shift"
    gradient: ClassVar[str] = "of the class vectors"
    chooses_once: ClassVar[bool] = False

    templates: Templates = described(
        'Prompts whose mean each class vector is: a list, "openai", "simple", or None for the one of ctx_init.', None
    )
    per_class: bool = described("A shift for each class; else one for all. Published scripts: for each.", True)

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "templates", read_templates(self.templates))
        check_bool("per_class", self.per_class)

    def tuned(self, classes: Classes) -> Tuned:
        return _Shifted(classes.prototypes(self.templates), self.per_class)


class _Shifted:
    """Class features unit(P + d): prototypes P [U, D] and a shift d, [U, D] or for all [1, D].

    Where each image has prototypes of its own there are B of either."""

    def __init__(self, prototypes: Tensor, per_class: bool) -> None:
        self._prototypes, self.storage = prototypes, prototypes.dtype
        self.ctx_init = torch.zeros_like(prototypes[..., : None if per_class else 1, :])

    def initial(self) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        return self.forward(self.ctx_init, True)

    def forward(self, shift: Tensor, keep: bool) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        shifted = self._prototypes + shift
        length = shifted.norm(dim=-1, keepdim=True)
        return shifted / length, (shifted / length, length)

    def backward(self, tape: tuple[Tensor, Tensor], grad: Tensor) -> Tensor:
        features, length = tape
        grad = (grad - features * (features * grad).sum(-1, keepdim=True)) / length
        return grad if self.ctx_init.shape == self._prototypes.shape else grad.sum(-2, keepdim=True)
