"""A linear layer on a weight that is laid out in panels."""

from __future__ import annotations

import torch
from torch import Tensor

from .bias_act import bias_act

PANEL = {torch.float32: 16, torch.bfloat16: 64}  #: columns of the result that lie together
TOGETHER = {torch.float32: 1, torch.bfloat16: 2}  #: inputs of a column that lie together


def panels(weight: Tensor) -> Tensor:
    """See :func:`tpt_fast.ops.linear.panels`."""
    (width, depth), panel, together = weight.shape, PANEL[weight.dtype], TOGETHER[weight.dtype]
    whole = torch.nn.functional.pad(weight, (0, -depth % together, 0, -width % panel))
    cut = whole.unflatten(1, (-1, together)).unflatten(0, (-1, panel)).transpose(1, 2).contiguous()
    return cut if together > 1 else cut.squeeze(-1)


def linear(x: Tensor, panels: Tensor, bias: Tensor | None, width: int, activation: int) -> Tensor:
    """See :func:`tpt_fast.ops.linear.linear`."""
    cut = panels if panels.dim() == 4 else panels.unsqueeze(-1)
    weight = cut.transpose(1, 2).flatten(2).flatten(0, 1)[:width, : x.shape[1]]
    y = torch.nn.functional.linear(x.float(), weight.float(), bias)
    return (bias_act(y, None, quick=activation == 2) if activation else y).to(x.dtype)
