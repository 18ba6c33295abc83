"""ZERO (Farina et al., NeurIPS 2024): the confident views vote."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .._checks import check_bool, check_number
from .._fields import described
from .._stages import Stages
from ..text.classes import Classes
from ..text.templates import Templates, read_templates
from . import Answer, Method, n_selected
from .zero_shot import zero_shot


@dataclass(frozen=True)
class Zero(Method):
    """The confident views vote, others break ties. Probabilities are shares of votes."""

    name: ClassVar[str] = "zero"
    paper: ClassVar[str] = "Farina et al., NeurIPS 2024"
    tunes: ClassVar[str] = "nothing"
    gradient: ClassVar[str] = "none"

    gamma: float = described("Part of the views that vote, in (0, 1], at least one. Paper: 0.3.", 0.3)
    templates: Templates = described(
        'Prompts whose mean each class vector is: a list, "openai", "simple" (published as +Ensemble), or None for the '
        "one of ctx_init.",
        None,
    )
    half: bool = described(
        "Cosines in float16, as the published code has them under autocast: the temperature is float16's rounding unit "
        "then, 1/1024, and near ties share a vote.",
        False,
    )
    strict: bool = described(
        "A tie that no other view decides goes the way of the published code, which looks at the wrong classes; by "
        "default the most confident view decides. Names that repeat share their votes.",
        False,
    )

    def __post_init__(self) -> None:
        check_number("gamma", self.gamma, "a number in (0, 1]", lambda v: 0 < v <= 1)
        object.__setattr__(self, "templates", read_templates(self.templates))
        check_bool("half", self.half)
        check_bool("strict", self.strict)

    def check(self, n_views: int) -> None:
        if n_selected(n_views, self.gamma, strict=self.strict) == n_views and self.strict:
            raise ValueError(f"gamma: expected a view of {n_views} left to break ties with strict, got {self.gamma}")

    def prepare(self, classes: Classes) -> None:
        classes.prototypes(self.templates)

    def __call__(self, images: Tensor, classes: Classes, stages: Stages) -> Answer:
        with stages("vote"):
            features = classes.prototypes(self.templates)
            features = classes.expand(features) if self.strict else features  # each different name has votes of its own
            dtype = torch.float16 if self.half else images.dtype
            cosines = images.to(dtype) @ features.to(dtype).mT
            found = self.vote(cosines, self.entropies(cosines, classes))
            for name in ("votes", "decided"):
                found[name] = found[name] if self.strict else classes.expand(found[name].unsqueeze(-1)).squeeze(-1)
            votes = found.pop("decided")
            logits = votes.clamp_min(torch.finfo(votes.dtype).tiny).log()
        return Answer(logits, zero_shot(images, classes), votes.isfinite().all(-1), found)

    def entropies(self, cosines: Tensor, classes: Classes) -> Tensor:
        """[B, N] of the views' class probabilities, each name counted as often as it comes."""
        columns = cosines if self.strict else classes.expand(cosines.mT).mT
        scaled = columns * classes.scale.to(cosines.dtype)
        probs = scaled.float().softmax(-1)
        logs = probs.log() if self.strict else scaled.float().log_softmax(-1)  # there 0 log 0 is NaN, which comes last
        return -(probs * logs).sum(-1)

    def vote(self, cosines: Tensor, entropies: Tensor) -> dict[str, Tensor]:
        """Votes from cosines [B, N, C] and entropies [B, N].

        Returns:
            "votes" [B, C], "selected" [B, K] ascending in entropy, "entropies", and "decided": the votes with one more
            for the class that a tie goes to.
        """
        kept = n_selected(cosines.shape[1], self.gamma)
        order = entropies.argsort(dim=-1, stable=True)
        chosen, later = order[:, :kept], order[:, kept:]

        def rows(views: Tensor) -> Tensor:
            return cosines.take_along_dim(views.unsqueeze(-1), 1)

        votes = (rows(chosen) / torch.finfo(cosines.dtype).eps).float().softmax(-1).sum(1)
        tied = votes == votes.amax(-1, keepdim=True)
        first = votes.argmax(-1, keepdim=True)
        if later.shape[1]:
            says = rows(later).argmax(-1)  # [B, M]
            fits = tied.gather(1, says)
            place = fits.int().argmax(-1, keepdim=True)  # of the first view that decides
            decider = says.gather(1, place)
        if self.strict:  # `~` of the indices of tied classes: C - 1 - index
            undecided = rows(later[:, :1])[:, 0].masked_fill(tied.flip(-1), -torch.inf).argmax(-1, keepdim=True)
        else:
            undecided = rows(order[:, :1])[:, 0].masked_fill(~tied, -torch.inf).argmax(-1, keepdim=True)
        winner = torch.where(fits.any(-1, keepdim=True), decider, undecided) if later.shape[1] else undecided
        several = tied.sum(-1, keepdim=True) > 1
        decided = votes.scatter_add(1, torch.where(several, winner, first), several.to(votes.dtype))
        return {"votes": votes, "selected": chosen, "entropies": entropies, "decided": decided}
