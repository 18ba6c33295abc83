"""Logits of all views -> entropies, kept views, marginal entropy and its gradient."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..extension import load
from ..reference.objective import objective as reference
from ._library import check_tensors, define, differentiate_once

define(
    "objective(Tensor logits, int n_selected, Tensor? selected=None) -> (Tensor, Tensor, Tensor, Tensor)",
    reference,
    # It keeps the counters that its first call on a device allocates, and torch.compile's graphs reuse that memory.
    tags=[torch.Tag.cudagraph_unsafe],
)


@torch.library.register_fake("tpt_fast::objective")
def _fake(logits: Tensor, n_selected: int, selected: Tensor | None = None) -> tuple[Tensor, ...]:
    batch, classes = logits.shape[:-2], logits.shape[-1]
    return (
        logits.new_empty(logits.shape[:-1]),
        logits.new_empty((*batch, n_selected), dtype=torch.int64),
        logits.new_empty(batch),
        logits.new_empty((*batch, n_selected, classes)),
    )


def _setup_context(ctx: Any, inputs: Any, output: Any) -> None:
    entropy, selected, _, grad = output
    ctx.mark_non_differentiable(selected, grad)
    ctx.save_for_backward(inputs[0], entropy, selected, grad)


def _backward(ctx, grad_entropy, _grad_selected, grad_loss, _grad_grad):
    logits, entropy, selected, grad = ctx.saved_tensors
    index = selected.unsqueeze(-1).expand_as(grad)
    result = torch.zeros_like(logits).scatter(-2, index, grad * grad_loss[..., None, None])
    if grad_entropy is not None:  # dH/dx_c = -p_c (log p_c + H)
        log_probs = logits.log_softmax(-1)
        slope = torch.where(log_probs == -torch.inf, 0.0, log_probs.exp() * (log_probs + entropy.unsqueeze(-1)))
        result = result - slope * grad_entropy.unsqueeze(-1)
    return result, None, None


differentiate_once("objective", _backward, _setup_context)


class Objective(NamedTuple):
    """What :func:`objective` returns; B is the leading batch of images, or absent."""

    entropy: Tensor  #: [B, N] entropy of each view's class probabilities, in nats
    selected: Tensor  #: [B, K] int64, the kept views, ascending in entropy
    loss: Tensor  #: [B] entropy of the kept views' mean class probabilities
    grad: Tensor  #: [B, K, C] d loss / d logits of the kept views


def objective(logits: Tensor, n_selected: int, selected: Tensor | None = None) -> Objective:
    """Marginal entropy of the most confident views, and its gradient, in one pass over the logits.

    Shu et al., NeurIPS 2022, equations 2 to 4: keep the ``n_selected`` views whose predictions have the lowest entropy,
    average their class probabilities (in log space), and take the entropy of that average.

    Args:
        logits: [N, C] or [B, N, C], float32 (float64 on the CPU), any strides; B images, N views, C classes. -inf
            stands for a class of probability zero. A view with NaN or +inf has entropy NaN and is kept last.
        n_selected: K, how many views to keep, in 1..N.
        selected: int64 [K] or [B, K]: keep these views instead, as the published code does from its second step on.
            An index that is no view is an error on the CPU, undefined on CUDA.

    Returns:
        :class:`Objective`. ``loss`` and ``entropy`` are differentiable in ``logits`` (once: there is no double
        backward); ties are broken by the lower index.

    Raises:
        ValueError: a shape, or a value of ``n_selected``, out of range.
        TypeError: logits of another type.
    """
    check_tensors("objective", differentiable=True, logits=logits, selected=selected)
    if logits.dim() not in (2, 3) or logits.shape[-1] < 1 or logits.shape[-2] < 1:
        raise ValueError(f"logits: expected a non-empty [N, C] or [B, N, C], got {list(logits.shape)}")
    if logits.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"logits: expected float32 or float64, got {logits.dtype}")
    if not 1 <= n_selected <= logits.shape[-2]:
        raise ValueError(f"n_selected: expected 1 to {logits.shape[-2]} (the number of views), got {n_selected}")
    expected = [*logits.shape[:-2], n_selected]
    if selected is not None and (list(selected.shape) != expected or selected.dtype != torch.int64):
        raise ValueError(f"selected: expected int64 {expected}, got {selected.dtype} {list(selected.shape)}")
    load.ensure(logits.device)
    return Objective(*torch.ops.tpt_fast.objective(logits, n_selected, selected))
