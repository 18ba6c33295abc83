"""Marginal entropy of the most confident views (Shu et al., NeurIPS 2022, equations 2 to 4)."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def objective(logits: Tensor, n_selected: int, selected: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See :func:`tpt_fast.ops.objective`, whose results these are, operation by operation."""
    log_probs = logits.log_softmax(-1)
    # A class of probability zero adds nothing: 0 log 0 = 0.
    entropy = -torch.where(log_probs == -math.inf, 0.0, log_probs.exp() * log_probs).sum(-1)
    if selected is None:
        order = torch.where(entropy.isnan(), math.inf, entropy)  # NaN last
        selected = order.argsort(dim=-1, stable=True)[..., :n_selected].contiguous()
    else:
        selected = selected.clone()

    kept = log_probs.gather(-2, selected.unsqueeze(-1).expand(*selected.shape, logits.shape[-1]))
    log_mean = (kept.logsumexp(-2) - math.log(n_selected)).clamp_min(torch.finfo(logits.dtype).min)
    loss = -(log_mean.exp() * log_mean).sum(-1)

    probs = kept.exp()
    cross = (probs * log_mean.unsqueeze(-2)).sum(-1, keepdim=True)
    grad = probs * (cross - log_mean.unsqueeze(-2)) / n_selected
    return entropy, selected, loss, grad
