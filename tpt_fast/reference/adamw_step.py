"""One AdamW step (Loshchilov and Hutter, ICLR 2019) with the semantics of ``torch.optim.AdamW``."""

from __future__ import annotations

import torch
from torch import Tensor


def adamw_step(
    ctx: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    step: int | Tensor,
    lr: float,
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.01,
) -> tuple[Tensor, Tensor, Tensor]:
    """Context, first and second moment after step number ``step`` (1 is the first); all tensors of one shape."""
    exp_avg = exp_avg.lerp(grad, 1 - beta1)
    exp_avg_sq = exp_avg_sq * beta2 + grad * grad * (1 - beta2)
    scale = lr / (1 - beta1**step)
    denominator = exp_avg_sq.sqrt() / (1 - beta2**step) ** 0.5 + eps
    return ctx * (1 - lr * weight_decay) - scale * exp_avg / denominator, exp_avg, exp_avg_sq


def adamw_step_or_skip(
    context: Tensor,
    grad: Tensor,
    exp_avg: Tensor | None,
    exp_avg_sq: Tensor | None,
    step: Tensor | None,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    skip_nonfinite: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See :func:`tpt_fast.ops.adamw_step.adamw_step`."""
    first, second = (torch.zeros_like(context) if t is None else t for t in (exp_avg, exp_avg_sq))
    step = context.new_zeros(context.shape[0], dtype=torch.int64) if step is None else step
    number = (step + 1).to(context.dtype)[:, None, None]
    after = adamw_step(context, grad, first, second, number, lr, beta1, beta2, eps, weight_decay)
    skipped = ~grad.isfinite().flatten(1).all(1) & skip_nonfinite
    before = (context, first, second)
    ctx, avg, avg_sq = (torch.where(skipped[:, None, None], old, new) for old, new in zip(before, after, strict=True))
    return ctx, avg, avg_sq, step + (~skipped).long()
