"""Bias and activation of a transformer's MLP."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def bias_act(x: Tensor, bias: Tensor | None, quick: bool) -> Tensor:
    """See :func:`tpt_fast.ops.bias_act`."""
    y = _biased(x, bias)
    return (y * (1.702 * y).sigmoid() if quick else torch.nn.functional.gelu(y)).to(x.dtype)


def bias_act_(x: Tensor, bias: Tensor | None, quick: bool) -> None:
    """See :func:`tpt_fast.ops.bias_act_`."""
    x.copy_(bias_act(x, bias, quick))


def bias_act_backward(grad: Tensor, x: Tensor, bias: Tensor | None, quick: bool) -> Tensor:
    """Gradient with respect to ``x``."""
    y = _biased(x, bias)
    if quick:
        s = (1.702 * y).sigmoid()
        slope = s + 1.702 * y * s * (1 - s)
    else:
        density = (-0.5 * y * y).exp() / math.sqrt(2 * math.pi)
        slope = 0.5 * torch.special.erfc(-y / math.sqrt(2)) + y * density
    return (grad * slope).to(x.dtype)


def _biased(x: Tensor, bias: Tensor | None) -> Tensor:
    x = x if x.dtype == torch.float64 else x.float()
    return x if bias is None else x + bias
