"""Residual add and LayerNorm."""

from __future__ import annotations

import torch
from torch import Tensor


def add_layer_norm(
    x: Tensor, delta: Tensor | None, delta_bias: Tensor | None, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See :func:`tpt_fast.ops.add_layer_norm`; here ``sum`` is empty [0] without ``delta``."""
    total = _wide(x)
    if delta is not None:
        branch = _wide(delta) if delta_bias is None else _wide(delta) + delta_bias
        # Rounded before it is normalised, so that forward and backward see the same values.
        total = _wide((total + branch).to(x.dtype))
    mean = total.mean(-1)
    centred = total - mean.unsqueeze(-1)
    rstd = (centred.square().mean(-1) + eps).rsqrt()
    normed = (centred * rstd.unsqueeze(-1) * weight + bias).to(x.dtype)
    return x.new_empty(0) if delta is None else total.to(x.dtype), normed, mean, rstd


def add_layer_norm_backward(
    grad_normed: Tensor, grad_sum: Tensor | None, sum: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor
) -> Tensor:
    """Gradient with respect to ``sum``, and so to ``x`` and ``delta``; ``grad_sum`` reaches it by other ways."""
    centred = _wide(sum) - mean.unsqueeze(-1)
    scale = rstd.unsqueeze(-1)
    grad = _wide(grad_normed) * weight
    along = (grad * centred).mean(-1, keepdim=True) * scale * scale
    grad = scale * (grad - grad.mean(-1, keepdim=True) - centred * along)
    return (grad if grad_sum is None else grad + _wide(grad_sum)).to(sum.dtype)


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()
