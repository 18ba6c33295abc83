"""R-TPT (Sheng et al., CVPR 2025): TPT that a few attacked views cannot mislead."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .. import ops
from .._checks import check_bool, check_integer, check_number
from .._fields import described
from ..ops.objective import Objective
from .tpt import Tpt


@dataclass(frozen=True)
class Rtpt(Tpt):
    """TPT on the entropy of each kept view by itself; all views answer, weighted by their neighbours."""

    name: ClassVar[str] = "rtpt"
    paper: ClassVar[str] = "Sheng et al., CVPR 2025"

    neighbours: int = described("How many of a view's nearest others its weight is made of. Published code: 20.", 20)
    temperature: float = described("Of the softmax over views that makes the weights. Published code: 0.01.", 0.01)
    strict: bool = described(
        "Take a view for its own neighbour wherever the square of its feature rounds to less than 1, as the published "
        "code does; by default it never is.",
        False,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_integer("neighbours", self.neighbours, 1)
        check_number("temperature", self.temperature, "a number above 0", lambda v: v > 0)
        check_bool("strict", self.strict)

    def check(self, n_views: int) -> None:
        super().check(n_views)
        if n_views <= self.neighbours:
            raise ValueError(
                f"n_views: expected more than the {self.neighbours} neighbours of method 'rtpt', got {n_views}"
            )

    def entropy(self, logits: Tensor, n_selected: int, selected: Tensor | None) -> Objective:
        """The mean over the kept views of their own entropies, in place of the entropy of their mean."""
        found = ops.objective(logits, n_selected, selected)
        kept = logits.take_along_dim(found.selected.unsqueeze(-1), -2)
        log_probs = kept.log_softmax(-1).clamp_min(torch.finfo(kept.dtype).min)  # 0 log 0 = 0
        entropies = -(log_probs.exp() * log_probs).sum(-1, keepdim=True)
        grad = -log_probs.exp() * (log_probs + entropies) / n_selected
        return found._replace(loss=entropies.mean((-2, -1)), grad=grad)

    def predict(self, images: Tensor, logits: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        similarity = images @ images.mT
        itself = torch.eye(images.shape[1], dtype=torch.bool, device=images.device)
        weight = self.view_weights(similarity.masked_fill(similarity >= 1 if self.strict else itself, -torch.inf))
        return (weight.unsqueeze(-1) * logits).sum(-2), {"view_weights": weight}

    def view_weights(self, similarity: Tensor) -> Tensor:
        """Weights [B, N] of the views from their cosines [B, N, N], -inf where they do not count."""
        return (similarity.topk(self.neighbours).values.mean(-1) / self.temperature).softmax(-1)
