"""One AdamW step on the contexts of a batch of images."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..extension import load
from ..reference.adamw_step import adamw_step_or_skip as reference
from ._library import check_tensors, define

define(
    "adamw_step(Tensor context, Tensor grad, Tensor? exp_avg, Tensor? exp_avg_sq, Tensor? step, float lr, float beta1, "
    "float beta2, float eps, float weight_decay, bool skip_nonfinite) -> (Tensor, Tensor, Tensor, Tensor)",
    reference,
)


@torch.library.register_fake("tpt_fast::adamw_step")
def _fake(context, grad, exp_avg, exp_avg_sq, step, lr, beta1, beta2, eps, weight_decay, skip_nonfinite):
    like = [context.new_empty(context.shape) for _ in range(3)]
    return (*like, context.new_empty(context.shape[0], dtype=torch.int64))


class AdamWState(NamedTuple):
    """What :func:`adamw_step` returns, and takes back for the next step."""

    context: Tensor  #: [B, n_ctx, width]
    exp_avg: Tensor  #: [B, n_ctx, width] running mean of the gradient
    exp_avg_sq: Tensor  #: [B, n_ctx, width] running mean of its square
    step: Tensor  #: [B] int64, steps taken


def adamw_step(
    context: Tensor,
    grad: Tensor,
    exp_avg: Tensor | None = None,
    exp_avg_sq: Tensor | None = None,
    step: Tensor | None = None,
    *,
    lr: float = 5e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.01,
    skip_nonfinite: bool = True,
) -> AdamWState:
    """One step of ``torch.optim.AdamW`` for each context of the batch. Not differentiable; writes nothing in place.

    Args:
        context: [B, n_ctx, width] float32 or float64, one context an image.
        grad: like ``context``.
        exp_avg, exp_avg_sq, step: the state that the last step returned, or None for a fresh optimizer (all three).
        lr, betas, eps, weight_decay: as in ``torch.optim.AdamW``; the defaults are TPT's.
        skip_nonfinite: an image whose gradient is not finite everywhere keeps its context and state, and its ``step``
            does not advance, which is how to see it; decided on the device, without waiting for it.

    Raises:
        ValueError: a shape, or only part of the state.
        TypeError: a tensor of another type.
    """
    # A parameter may come as it is: its gradient ends here, as at every optimiser.
    check_tensors(
        "adamw_step",
        differentiable=True,
        context=context,
        grad=grad,
        exp_avg=exp_avg,
        exp_avg_sq=exp_avg_sq,
        step=step,
    )
    if context.dim() != 3:
        raise ValueError(f"context: expected [B, n_ctx, width], got {list(context.shape)}")
    if context.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"context: expected float32 or float64, got {context.dtype}")
    state = {"exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq, "step": step}
    given = [name for name, tensor in state.items() if tensor is not None]
    if given and len(given) < 3:
        raise ValueError(f"{given[0]}: expected exp_avg, exp_avg_sq and step together or not at all, got {given}")
    for name, tensor in {"grad": grad, "exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}.items():
        if tensor is None:
            continue
        if tensor.shape != context.shape:
            raise ValueError(f"{name}: expected {list(context.shape)}, got {list(tensor.shape)}")
        if tensor.dtype != context.dtype:
            raise TypeError(f"{name}: expected {context.dtype}, got {tensor.dtype}")
    if step is not None and (step.shape != context.shape[:1] or step.dtype != torch.int64):
        raise ValueError(f"step: expected int64 [{context.shape[0]}], got {step.dtype} {list(step.shape)}")
    load.ensure(context.device)
    results = torch.ops.tpt_fast.adamw_step(
        context, grad, exp_avg, exp_avg_sq, step, lr, *betas, eps, weight_decay, skip_nonfinite
    )
    return AdamWState(*results)
