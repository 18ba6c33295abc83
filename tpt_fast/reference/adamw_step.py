"""One AdamW step (Loshchilov and Hutter, ICLR 2019) with the semantics of ``torch.optim.AdamW``."""

from __future__ import annotations

import math

from torch import Tensor


def adamw_step(
    ctx: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    step: int,
    lr: float,
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.01,
) -> tuple[Tensor, Tensor, Tensor]:
    """Context, first and second moment after step number ``step`` (1 is the first); all tensors of one shape."""
    exp_avg = exp_avg + (grad - exp_avg) * (1 - beta1)
    exp_avg_sq = exp_avg_sq * beta2 + grad * grad * (1 - beta2)
    scale = lr / (1 - beta1**step)
    denominator = exp_avg_sq.sqrt() / math.sqrt(1 - beta2**step) + eps
    return ctx * (1 - lr * weight_decay) - scale * exp_avg / denominator, exp_avg, exp_avg_sq
