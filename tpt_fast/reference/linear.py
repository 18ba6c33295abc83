"""A linear layer on a weight that is laid out in panels."""

from __future__ import annotations

import torch
from torch import Tensor

from .bias_act import bias_act

PANEL = 16  #: columns of the result that lie together


def panels(weight: Tensor) -> Tensor:
    """See :func:`tpt_fast.ops.linear.panels`."""
    width, depth = weight.shape
    whole = torch.nn.functional.pad(weight, (0, 0, 0, -width % PANEL))
    return whole.view(-1, PANEL, depth).transpose(1, 2).contiguous()


def linear(x: Tensor, panels: Tensor, bias: Tensor | None, width: int, activation: int) -> Tensor:
    """See :func:`tpt_fast.ops.linear.linear`."""
    weight = panels.transpose(1, 2).flatten(0, 1)[:width]
    y = torch.nn.functional.linear(x, weight, bias)
    return bias_act(y, None, quick=activation == 2) if activation else y
