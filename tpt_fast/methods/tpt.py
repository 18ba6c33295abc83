"""The loop of a batch of images, each with a prompt of its own: objective, gradient, update, prediction."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .._stages import Stages
from ..config import TuneConfig
from ..graphs.bundle import Bundle
from ..graphs.replay import Graphs
from ..ops import objective
from ..ops.adamw_step import adamw_step
from ..text import TextEncoder

ObjectiveFunction = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Classes:
    """One list of classes. Each different name is encoded once, so names that repeat have equal logits to the bit."""

    names: tuple[str, ...]
    text: TextEncoder
    start: Tensor  # the initial context, float32 on the CPU
    inverse: Tensor | None  # [C], which of the different names each is; None if no name repeats
    places: Tensor | None = None  # [U, most repeats], where each different name stands, filled up with C; likewise
    bias: Tensor | None = None  # [], the model's logit bias
    graphs: Graphs | None = None  # of the loop, where it is captured

    def logits(self, images: Tensor, features: Tensor) -> Tensor:
        """[B, N, C] from scaled image features [B, N, D] and text features, [U, D] of all images or [B, U, D]."""
        logits = images @ features.to(images.dtype).mT
        logits = logits if self.bias is None else logits + self.bias
        return logits if self.inverse is None else logits[..., self.inverse]

    def grad_features(self, images: Tensor, grad_logits: Tensor) -> Tensor:
        """[B, U, D] from the same rows of the scaled image features [B, K, D] and the logits' gradient [B, K, C]."""
        if self.places is not None:  # sums in a fixed order, which index_add on a GPU would not keep
            grad_logits = nn.functional.pad(grad_logits, (0, 1))[..., self.places].sum(-1)
        return grad_logits.mT @ images


class Tuned(NamedTuple):
    """B images tuned: tensors on their device, which nothing has waited for."""

    logits: Tensor  # [B, C] of view 0
    zero_shot_logits: Tensor  # [B, C]
    ctx: Tensor  # [B, n_ctx, width]; class-specific [B, U, n_ctx, width]
    grad: Tensor  # like ctx, of the last step
    entropies: Tensor  # [B, N]
    selected: Tensor  # [B, K]
    loss: Tensor  # [B]
    loss_after: Tensor  # [B]
    status: Tensor  # bool [B]: False where a loss or gradient was not finite

    def bundle(self) -> Bundle:
        """All of it, floating point as float32."""
        return Bundle.of(*(value.float() if value.is_floating_point() else value for value in self))

    def rows(self) -> list[dict[str, Any]]:
        """What each image's :class:`~tpt_fast.TuneResult` says, of tensors that are on the CPU."""
        columns: dict[str, Any] = self._asdict()
        columns |= {name: columns[name].tolist() for name in ("loss", "loss_after")}
        columns["status"] = ["tuned" if good else "skipped" for good in columns["status"].tolist()]
        return [{name: column[i] for name, column in columns.items()} for i in range(len(self.logits))]


def tune_features(
    images: Tensor, classes: Classes, config: TuneConfig, stages: Stages, custom: ObjectiveFunction | None = None
) -> Tuned:
    """Tune for B images.

    An image whose loss or gradient is not finite in any step, or whose answer is not, gets the zero-shot answer; the
    others do not notice.

    Args:
        images: [B, N, D] features of all views times the logit scale.
        custom: what to minimise in place of the marginal entropy, a function of one image's logits [N, C].
    """
    text, kept = classes.text, config.n_selected(images.shape[1])

    def evaluate(features: Tensor, selected: Tensor | None) -> _Evaluation:
        with stages("objective"):
            logits = classes.logits(images, features)
            found = objective(logits, kept, selected)
            loss, grad, rows = found.loss, found.grad, found.selected
            if custom is not None:
                loss, grad, rows = *_differentiate(logits, custom), None
            chosen = images if rows is None else images.take_along_dim(rows.unsqueeze(-1), 1)
            grad_features = classes.grad_features(chosen, grad)
        return _Evaluation(logits[:, 0], loss, grad_features, found.entropy, found.selected)

    features, tape = text.initial()
    start = text.ctx_init.expand(len(images), *text.ctx_init.shape)
    ctx, grad, moments = start, torch.zeros_like(start), ()
    now = first = evaluate(features, None)
    for step in range(1, config.steps + 1):
        with stages("text backward"):
            grad = text.backward(tape, now.grad_features)
        with stages("update"):  # a bad loss counts as a bad gradient; class-specific contexts are just more vectors
            usable = _where(now.loss.isfinite(), grad, torch.full_like(grad, torch.nan))
            flat = (tensor.reshape(len(images), -1, tensor.shape[-1]) for tensor in (ctx, usable))
            after = adamw_step(*flat, *moments, lr=config.lr, weight_decay=config.weight_decay)
            ctx, moments = after.context.view(start.shape), after[1:]
        with stages("text forward"):
            features, tape = text.forward(ctx, keep=step < config.steps)
        now = evaluate(features, first.selected)

    tuned = torch.ones_like(now.loss, dtype=torch.bool)
    if moments:
        tuned = (moments[-1] == config.steps) & now.logits.isfinite().all(-1)
    return Tuned(
        logits=_where(tuned, now.logits, first.logits),
        zero_shot_logits=first.logits,
        ctx=_where(tuned, ctx, start),
        grad=grad,
        entropies=first.entropies,
        selected=first.selected,
        loss=first.loss,
        loss_after=_where(tuned, now.loss, first.loss),
        status=tuned,
    )


class _Evaluation(NamedTuple):
    """B images with one set of text features each."""

    logits: Tensor  # [B, C] of view 0
    loss: Tensor  # [B]
    grad_features: Tensor  # [B, U, D] of the loss
    entropies: Tensor  # [B, N]
    selected: Tensor  # [B, K]


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
            grads.append(grad)
        losses.append(loss.detach().reshape(()))
    return torch.stack(losses), torch.stack(grads)


def _where(which: Tensor, yes: Tensor, no: Tensor) -> Tensor:
    """Of each image [B, ...] one or the other."""
    return torch.where(which.view(-1, *[1] * (yes.dim() - 1)), yes, no)
