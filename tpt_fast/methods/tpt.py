"""TPT (Shu et al., NeurIPS 2022): the context that makes the mean prediction of the confident views more certain.

For B images together, each with a context of its own: objective, gradient, update, prediction. What its relatives do
otherwise is a method of :class:`Tpt` that they replace.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor

from .. import ops
from .._checks import check_integer, check_number
from .._fields import described
from .._stages import Stages
from ..ops.adamw_step import adamw_step
from ..ops.objective import Objective
from ..text.classes import Classes
from . import Answer, Method, n_selected
from .objective import ObjectiveFunction, check_objective, differentiate


class Tuned(Protocol):
    """Class features as a function of what is tuned; a :class:`~tpt_fast.TextEncoder` of the context is one."""

    ctx_init: Tensor  #: [n, W] or class-specific [U, n, W]; [B, n, W] where each image has a start of its own
    storage: torch.dtype  #: in which features are computed

    def initial(self) -> tuple[Tensor, Any]:
        """Features [U, D] of :attr:`ctx_init`, or [B, U, D], and their tape."""

    def forward(self, ctx: Tensor, keep: bool) -> tuple[Tensor, Any]:
        """Features [B, U, D] of B contexts, and with ``keep`` their tape."""

    def backward(self, tape: Any, grad_features: Tensor) -> Tensor:
        """Gradients of B contexts."""


@dataclass(frozen=True)
class Tpt(Method):
    """The context of the prompt, tuned so that the confident views agree: equations 3 to 5 of the paper.

    An image whose loss or gradient is not finite in any step, or whose answer is not, gets the zero-shot answer; the
    others do not notice.
    """

    name: ClassVar[str] = "tpt"
    paper: ClassVar[str] = "Shu et al., NeurIPS 2022"
    tunes: ClassVar[str] = "the context"
    variable: ClassVar[str] = "ctx"  #: its name in ``extra``
    chooses_once: ClassVar[bool] = True  #: the views that the first step keeps are the later steps' too

    rho: float = described(
        "Part of the views that is kept, in (0, 1]: the int(n_views * rho) most confident, at least one. Paper: 0.1.",
        0.1,
    )
    steps: int = described("AdamW steps, 0 or more. Paper: 1.", 1)
    lr: float = described("Learning rate, 0 or more. Paper: 5e-3.", 5e-3)
    weight_decay: float = described(
        "AdamW's decoupled weight decay, 0 or more. Published code: 0.01, torch's default.", 0.01
    )
    objective: ObjectiveFunction | None = None  #: of one image, in place of the marginal entropy

    def __post_init__(self) -> None:
        check_number("rho", self.rho, "a number in (0, 1]", lambda v: 0 < v <= 1)
        check_integer("steps", self.steps, 0)
        check_number("lr", self.lr, "a number of 0 or more", lambda v: v >= 0)
        check_number("weight_decay", self.weight_decay, "a number of 0 or more", lambda v: v >= 0)
        if self.objective is not None:
            check_objective(self.objective)

    # --- what relatives replace

    def tuned(self, classes: Classes) -> Tuned:
        """What is tuned; its value comes back in ``extra`` under the name :attr:`variable`."""
        return classes.text

    def entropy(self, logits: Tensor, n_selected: int, selected: Tensor | None) -> Objective:
        """Which views are kept, and what is minimised over them; see :func:`tpt_fast.ops.objective`."""
        return ops.objective(logits, n_selected, selected)

    def term(self, features: Tensor) -> tuple[Tensor, Tensor] | None:
        """A term of the loss that reads the class features [.., C, D] alone: its value [..] and gradient [.., C, D].

        Names that repeat come as often as they do in the list.
        """
        return None

    def weights(self, step: int) -> tuple[float, float]:
        """How much entropy and term count in a step, 0 being the first."""
        return 1.0, 1.0

    def predict(self, images: Tensor, logits: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The answer [B, C] from the features [B, N, D] and the tuned logits [B, N, C], and more to tell."""
        return logits[:, 0], {}

    # --- what they share

    @property
    def capturable(self) -> bool:
        return self.objective is None

    @property
    def keeps_activations(self) -> bool:
        return self.steps > 1 and self.gradient == Method.gradient

    def check(self, n_views: int) -> None:
        n_selected(n_views, self.rho)

    def prepare(self, classes: Classes) -> None:
        self._term(classes, self.tuned(classes).initial()[0])

    def __call__(self, images: Tensor, classes: Classes, stages: Stages) -> Answer:
        tuned = self.tuned(classes)
        features, tape = tuned.initial()
        start = tuned.ctx_init
        if features.dim() == 2:  # the same for all
            start = start.expand(len(images), *start.shape)
        ctx, grad = start, torch.zeros_like(start)
        moments: tuple[Tensor, ...] = ()
        doubtful = images.new_zeros(len(images))
        now = first = self._evaluate(images, classes, features, None, 0, stages)
        for step in range(1, self.steps + 1):
            with stages("text backward"):
                grad = tuned.backward(tape, now.grad_features)
            if step == 1:
                doubtful = _doubtful(grad, first, torch.finfo(tuned.storage).eps / 2)
            with stages("update"):  # a bad loss counts as a bad gradient; class-specific contexts are just more vectors
                usable = _where(now.loss.isfinite(), grad, torch.full_like(grad, torch.nan))
                flat = (tensor.reshape(len(images), -1, tensor.shape[-1]) for tensor in (ctx, usable))
                after = adamw_step(*flat, *moments, lr=self.lr, weight_decay=self.weight_decay)
                ctx, moments = after.context.view(start.shape), after[1:]
            with stages("text forward"):
                features, tape = tuned.forward(ctx, keep=step < self.steps)
            selected = first.selected if self.chooses_once or step == self.steps else None
            now = self._evaluate(images, classes, features, selected, step % self.steps, stages)

        logits, more = self.predict(images, now.logits)
        good = torch.ones_like(now.loss, dtype=torch.bool)
        if moments:
            good = (moments[-1] == self.steps) & logits.isfinite().all(-1)
        # What a term is rounded by, next to the entropy, is not known.
        found = {"doubtful": doubtful} if first.term is None else {"term": first.term.expand(len(images))}
        return Answer(
            logits=_where(good, logits, first.logits[:, 0]),
            zero_shot_logits=first.logits[:, 0],
            usable=good,
            extra={
                self.variable: _where(good, ctx, start),
                "grad": grad,
                "entropies": first.entropies,
                "selected": first.selected,
                "loss": first.loss,
                "loss_after": _where(good, now.loss, first.loss),
                **found,
                **more,
            },
        )

    def _evaluate(
        self, images: Tensor, classes: Classes, features: Tensor, selected: Tensor | None, step: int, stages: Stages
    ) -> _Evaluation:
        with stages("objective"):
            scaled = classes.scaled(images)
            logits = classes.logits(scaled, features)
            found = self.entropy(logits, n_selected(images.shape[1], self.rho), selected)
            if self.objective is None:
                loss, grad = found.loss, found.grad
                kept = scaled.take_along_dim(found.selected.unsqueeze(-1), 1)
                grad_features = classes.grad_features(kept, grad)
            else:
                own = differentiate(self.objective, logits, features, images, classes)
                loss, grad = own.loss, own.logits
                grad_features = classes.grad_features(scaled, grad) + classes.fold(own.features.mT).mT
            term = self._term(classes, features)
            if term is not None:
                entropy_weight, weight = self.weights(step)
                loss = entropy_weight * loss + weight * term[0]
                grad_features = entropy_weight * grad_features + weight * term[1]
        value, size = term and term[0], grad.abs().sum((1, 2))
        return _Evaluation(logits, loss, grad_features, found.entropy, found.selected, value, size)

    def _term(self, classes: Classes, features: Tensor) -> tuple[Tensor, Tensor] | None:
        """Of features [.., U, D]; of those that all images start from it is computed once."""

        def compute() -> tuple[Tensor, Tensor] | None:
            found = self.term(classes.expand(features))
            return found and (found[0], classes.fold(found[1].mT).mT)

        if features.dim() == 3 or type(self).term is Tpt.term:
            return compute()
        return classes.once(("term", self), compute)


class _Evaluation(NamedTuple):
    """B images with one set of text features each."""

    logits: Tensor  # [B, N, C]
    loss: Tensor  # [B]
    grad_features: Tensor  # [B, U, D] of the loss
    entropies: Tensor  # [B, N]
    selected: Tensor  # [B, K]
    term: Tensor | None  # [] or [B]
    grad_size: Tensor  # [B] sum of the magnitudes of d loss without the term / d logits


def _doubtful(grad: Tensor, first: _Evaluation, unit: float) -> Tensor:
    """[B], the share of the entries of ``grad`` [B, ..., W] that are smaller than its rounding.

    d loss / d logits of view i and class c is p_ic / K (sum_j p_ij log q_j - log q_c), a difference of numbers whose
    weighted magnitudes add up to twice the loss: what it is rounded by, next to what is left of it, passes on to the
    gradient as a whole. The towers add the roundings of some 64 sums.

    Args:
        unit: roundoff of the text tower's type.
    """
    cancelled = 2 * first.loss / first.grad_size.clamp_min(torch.finfo(grad.dtype).tiny)
    relative = 2.0**-24 * cancelled + 64 * unit
    flat = grad.flatten(1)
    return (flat.abs() < (relative * flat.square().mean(1).sqrt())[:, None]).to(grad.dtype).mean(1)


def _where(which: Tensor, yes: Tensor, no: Tensor) -> Tensor:
    """Of each image [B, ...] one or the other."""
    return torch.where(which.view(-1, *[1] * (yes.dim() - 1)), yes, no)
