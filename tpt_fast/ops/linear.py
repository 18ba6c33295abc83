"""A linear layer whose weight stays as it is, on a CPU."""

from __future__ import annotations

import torch
from torch import Tensor

from ..extension import load
from ..reference import linear as reference
from ._library import check_tensors, define
from .bias_act import ACTIVATIONS

define("linear(Tensor x, Tensor panels, Tensor? bias, int width, int activation) -> Tensor", reference.linear)

DTYPES = (torch.float32,)  #: of x and the weight

_NUMBERS = {None: 0} | {name: 1 + i for i, name in enumerate(ACTIVATIONS)}


@torch.library.register_fake("tpt_fast::linear")
def _fake(x: Tensor, panels: Tensor, bias: Tensor | None, width: int, activation: int) -> Tensor:
    return x.new_empty(len(x), width)


def panels(weight: Tensor) -> Tensor:
    """``weight`` [width, depth] as :func:`linear` reads it: [ceil(width / 16), depth, 16], zeros behind the last.

    Raises:
        ValueError: a weight of another shape.
    """
    if weight.ndim != 2 or not weight.shape[1]:
        raise ValueError(f"weight: expected [width, depth], got {list(weight.shape)}")
    return reference.panels(weight)


def linear(
    x: Tensor, panels: Tensor, bias: Tensor | None = None, *, width: int, activation: str | None = None
) -> Tensor:
    """``activation(x W^T + bias)``, not differentiable.

    Args:
        x: [..., depth] float32 on the CPU.
        panels: what :func:`panels` makes of W [width, depth].
        bias: [width] or None.
        width: rows of W.
        activation: "gelu" or "quick_gelu" (see :func:`~tpt_fast.ops.bias_act.bias_act`), or None.

    Returns:
        [..., width].

    Raises:
        ValueError: another activation, panels or a bias of another shape.
        TypeError: a tensor of another type.
    """
    check_tensors("linear", differentiable=False, x=x, panels=panels, bias=bias)
    if activation not in _NUMBERS:
        raise ValueError(f"activation: expected one of {', '.join(ACTIVATIONS)} or None, got {activation!r}")
    for name, given in (("x", x), ("panels", panels), ("bias", bias)):
        if given is not None and given.dtype != torch.float32:
            raise TypeError(f"{name}: expected torch.float32, got {given.dtype}")
    if not x.ndim:
        raise ValueError("x: expected [..., depth], got []")
    depth = x.shape[-1]
    expected = [-(-width // reference.PANEL), depth, reference.PANEL]
    if list(panels.shape) != expected:
        of = f"width={width} and x {list(x.shape)}"
        raise ValueError(f"panels: expected {expected} with {of}, got {list(panels.shape)}")
    if bias is not None and bias.shape != (width,):
        raise ValueError(f"bias: expected [{width}], got {list(bias.shape)}")
    load.ensure()
    rows = x.reshape(-1, depth)
    return torch.ops.tpt_fast.linear(rows, panels, bias, width, _NUMBERS[activation]).view(*x.shape[:-1], width)
