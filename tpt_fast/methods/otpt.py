"""O-TPT (Sharifdeen et al., CVPR 2025): class features are driven apart, which keeps predictions calibrated."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from .._checks import check_number
from .._fields import described
from ..text.classes import Classes
from .ctpt import at_least_two
from .tpt import Tpt


@dataclass(frozen=True)
class Otpt(Tpt):
    """TPT, plus a multiple of how far the class features are from orthogonal, as the published code measures it."""

    name: ClassVar[str] = "otpt"
    paper: ClassVar[str] = "Sharifdeen et al., CVPR 2025"

    lambda_term: float = described(
        "How much orthogonality of the class features counts. Published scripts: 18, of natural shifts 2.", 18.0
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("lambda_term", self.lambda_term, "a number of 0 or more", lambda v: v >= 0)

    def weights(self, step: int) -> tuple[float, float]:
        return 1.0, self.lambda_term

    def term(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """The mean over rows g of G = T T^T of ||g|| - 1.

        The published code sends each row to ||g|| e_i by a Householder reflection and takes its distance from e_i: the
        same value and gradient, without the C x C x C tensors.
        """
        gram = features @ features.mT
        length = gram.norm(dim=-1, keepdim=True)  # 1 or more, for the diagonal is
        slope = gram / (length * features.shape[-2])
        return length.mean((-2, -1)) - 1, (slope + slope.mT) @ features

    def prepare(self, classes: Classes) -> None:
        at_least_two(self.name, classes)
        super().prepare(classes)
