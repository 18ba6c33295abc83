"""A linear layer whose weight stays as it is, on a CPU."""

from __future__ import annotations

import torch
from torch import Tensor

from ..extension import load
from ..reference import linear as reference
from ._library import check_tensors, define
from .bias_act import ACTIVATIONS

define("linear(Tensor x, Tensor panels, Tensor? bias, int width, int activation) -> Tensor", reference.linear)

DTYPES = (torch.float32, torch.bfloat16)  #: of x and the weight

_NUMBERS = {None: 0} | {name: 1 + i for i, name in enumerate(ACTIVATIONS)}


@torch.library.register_fake("tpt_fast::linear")
def _fake(x: Tensor, panels: Tensor, bias: Tensor | None, width: int, activation: int) -> Tensor:
    return x.new_empty(len(x), width)


def panels(weight: Tensor) -> Tensor:
    """``weight`` [width, depth] as :func:`linear` reads it, zeros behind the last: [ceil(width / 16), depth, 16] in
    float32, [ceil(width / 64), ceil(depth / 2), 64, 2] in bfloat16.

    Raises:
        ValueError: a weight of another shape.
        TypeError: a weight of another type.
    """
    if weight.dtype not in DTYPES:
        raise TypeError(f"weight: expected torch.float32 or torch.bfloat16, got {weight.dtype}")
    if weight.ndim != 2 or not weight.shape[1]:
        raise ValueError(f"weight: expected [width, depth], got {list(weight.shape)}")
    return reference.panels(weight)


def linear(
    x: Tensor, panels: Tensor, bias: Tensor | None = None, *, width: int, activation: str | None = None
) -> Tensor:
    """``activation(x W^T + bias)``, computed in float32; not differentiable.

    Args:
        x: [..., depth] float32 or bfloat16 on the CPU.
        panels: what :func:`panels` makes of W [width, depth], of x's type.
        bias: [width] float32 or None.
        width: rows of W.
        activation: "gelu" or "quick_gelu" (see :func:`~tpt_fast.ops.bias_act.bias_act`), or None.

    Returns:
        [..., width] of x's type.

    Raises:
        ValueError: another activation, panels or a bias of another shape.
        TypeError: a tensor of another type.
    """
    check_tensors("linear", differentiable=False, x=x, panels=panels, bias=bias)
    if activation not in _NUMBERS:
        raise ValueError(f"activation: expected one of {', '.join(ACTIVATIONS)} or None, got {activation!r}")
    if x.dtype not in DTYPES:
        raise TypeError(f"x: expected torch.float32 or torch.bfloat16, got {x.dtype}")
    for name, given, wanted in (("panels", panels, x.dtype), ("bias", bias, torch.float32)):
        if given is not None and given.dtype != wanted:
            raise TypeError(f"{name}: expected {wanted} with x {x.dtype}, got {given.dtype}")
    if not x.ndim:
        raise ValueError("x: expected [..., depth], got []")
    depth, panel, together = x.shape[-1], reference.PANEL[x.dtype], reference.TOGETHER[x.dtype]
    expected = [-(-width // panel), -(-depth // together), panel, *([together] if together > 1 else [])]
    if list(panels.shape) != expected:
        of = f"width={width} and x {list(x.shape)}"
        raise ValueError(f"panels: expected {expected} with {of}, got {list(panels.shape)}")
    if bias is not None and bias.shape != (width,):
        raise ValueError(f"bias: expected [{width}], got {list(bias.shape)}")
    load.ensure()
    rows = x.reshape(-1, depth)
    if depth % together:
        rows = torch.nn.functional.pad(rows, (0, 1))
    return torch.ops.tpt_fast.linear(rows, panels, bias, width, _NUMBERS[activation]).view(*x.shape[:-1], width)
