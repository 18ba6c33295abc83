"""TPT (Shu et al., NeurIPS 2022): the context that makes the mean prediction of the confident views more certain.

For B images together, each with a context of its own: objective, gradient, update, prediction.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from .._stages import Stages
from ..ops import objective
from ..ops.adamw_step import adamw_step
from ..text.classes import Classes
from . import Answer, Method, n_selected

ObjectiveFunction = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Tpt(Method):
    """Equations 3 to 5 of the paper; options as in :class:`tpt_fast.TuneConfig`.

    An image whose loss or gradient is not finite in any step, or whose answer is not, gets the zero-shot answer; the
    others do not notice.
    """

    name: ClassVar[str] = "tpt"

    rho: float = 0.1
    steps: int = 1
    lr: float = 5e-3
    weight_decay: float = 0.01
    objective: ObjectiveFunction | None = None  #: of one image's logits [N, C], in place of the marginal entropy

    @property
    def capturable(self) -> bool:
        return self.objective is None

    @property
    def keeps_activations(self) -> bool:
        return self.steps > 1

    def check(self, n_views: int) -> None:
        n_selected(n_views, self.rho)

    def __call__(self, images: Tensor, classes: Classes, stages: Stages) -> Answer:
        text = classes.text
        images = classes.scaled(images)
        features, tape = text.initial()
        start = text.ctx_init.expand(len(images), *text.ctx_init.shape)
        ctx, grad, moments = start, torch.zeros_like(start), ()
        doubtful = images.new_zeros(len(images))
        now = first = self._evaluate(images, classes, features, None, stages)
        for step in range(1, self.steps + 1):
            with stages("text backward"):
                grad = text.backward(tape, now.grad_features)
            if step == 1:
                doubtful = _doubtful(grad, first, torch.finfo(text.storage).eps / 2)
            with stages("update"):  # a bad loss counts as a bad gradient; class-specific contexts are just more vectors
                usable = _where(now.loss.isfinite(), grad, torch.full_like(grad, torch.nan))
                flat = (tensor.reshape(len(images), -1, tensor.shape[-1]) for tensor in (ctx, usable))
                after = adamw_step(*flat, *moments, lr=self.lr, weight_decay=self.weight_decay)
                ctx, moments = after.context.view(start.shape), after[1:]
            with stages("text forward"):
                features, tape = text.forward(ctx, keep=step < self.steps)
            now = self._evaluate(images, classes, features, first.selected, stages)

        tuned = torch.ones_like(now.loss, dtype=torch.bool)
        if moments:
            tuned = (moments[-1] == self.steps) & now.logits.isfinite().all(-1)
        return Answer(
            logits=_where(tuned, now.logits, first.logits),
            zero_shot_logits=first.logits,
            usable=tuned,
            extra={
                "ctx": _where(tuned, ctx, start),
                "grad": grad,
                "entropies": first.entropies,
                "selected": first.selected,
                "loss": first.loss,
                "doubtful": doubtful,
                "loss_after": _where(tuned, now.loss, first.loss),
            },
        )

    def _evaluate(
        self, images: Tensor, classes: Classes, features: Tensor, selected: Tensor | None, stages: Stages
    ) -> _Evaluation:
        with stages("objective"):
            logits = classes.logits(images, features)
            found = objective(logits, n_selected(images.shape[1], self.rho), selected)
            loss, grad, rows = found.loss, found.grad, found.selected
            if self.objective is not None:
                loss, grad, rows = *_differentiate(logits, self.objective), None
            chosen = images if rows is None else images.take_along_dim(rows.unsqueeze(-1), 1)
            grad_features = classes.grad_features(chosen, grad)
        return _Evaluation(logits[:, 0], loss, grad_features, found.entropy, found.selected, grad.abs().sum((1, 2)))


class _Evaluation(NamedTuple):
    """B images with one set of text features each."""

    logits: Tensor  # [B, C] of view 0
    loss: Tensor  # [B]
    grad_features: Tensor  # [B, U, D] of the loss
    entropies: Tensor  # [B, N]
    selected: Tensor  # [B, K]
    grad_size: Tensor  # [B] sum of the magnitudes of d loss / d logits


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


def _differentiate(logits: Tensor, custom: ObjectiveFunction) -> tuple[Tensor, Tensor]:
    """Losses [B] and their gradient [B, N, C] of a user's function of one image's logits."""
    losses, grads = [], []
    for one in logits:
        with torch.enable_grad():
            leaf = one.detach().clone().requires_grad_()  # the objective may write to it
            loss = custom(leaf)
            if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.is_floating_point():
                got = f"{loss.dtype} {list(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
                raise ValueError(f"objective: expected it to return a scalar tensor, got {got}")
            grad = torch.autograd.grad(loss, leaf, allow_unused=True)[0] if loss.requires_grad else None
            if grad is None:
                raise ValueError("objective: expected it to depend on the logits, got a tensor without a gradient")
            others = [other for other in _leaves(loss) if other is not leaf]
            if others:
                shapes = ", ".join(str(list(other.shape)) for other in others[:3])
                raise ValueError(
                    "objective: expected a function of the logits alone, got one whose loss also depends on "
                    f"{len(others)} other tensors with a gradient ({shapes}): their part would be lost. Detach them, "
                    "or write a tpt_fast.methods.Method, which sees the text features"
                )
            grads.append(grad)
        losses.append(loss.detach().reshape(()))
    return torch.stack(losses), torch.stack(grads)


def _leaves(loss: Tensor) -> list[Tensor]:
    """The tensors whose gradient ``loss`` would accumulate."""
    waiting, seen, leaves = [loss.grad_fn], {None}, []
    while waiting:
        node = waiting.pop()
        if node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            leaves.append(node.variable)
        waiting += [following for following, _ in node.next_functions]
    return leaves


def _where(which: Tensor, yes: Tensor, no: Tensor) -> Tensor:
    """Of each image [B, ...] one or the other."""
    return torch.where(which.view(-1, *[1] * (yes.dim() - 1)), yes, no)
