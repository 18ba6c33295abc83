"""Bias and activation of a transformer's MLP."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._checks import check_choice
from ..extension import load
from ..reference import bias_act as reference
from ._library import check_tensors, define, differentiate_once
from ._types import FLOATING, accumulation_dtype

define("bias_act(Tensor x, Tensor? bias, bool quick) -> Tensor", reference.bias_act)
define("bias_act_(Tensor(a!) x, Tensor? bias, bool quick) -> ()", reference.bias_act_)
define("bias_act_backward(Tensor grad, Tensor x, Tensor? bias, bool quick) -> Tensor", reference.bias_act_backward)

ACTIVATIONS = ("gelu", "quick_gelu")


@torch.library.register_fake("tpt_fast::bias_act")
def _fake(x: Tensor, bias: Tensor | None, quick: bool) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@torch.library.register_fake("tpt_fast::bias_act_")
def _fake_in_place(x: Tensor, bias: Tensor | None, quick: bool) -> None:
    return None


@torch.library.register_fake("tpt_fast::bias_act_backward")
def _fake_backward(grad: Tensor, x: Tensor, bias: Tensor | None, quick: bool) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _setup_context(ctx: Any, inputs: Any, output: Any) -> None:
    x, bias, ctx.quick = inputs
    ctx.save_for_backward(x, bias)


def _backward(ctx, grad):
    x, bias = ctx.saved_tensors
    grad = torch.ops.tpt_fast.bias_act_backward(grad, x, bias, ctx.quick)
    grad_bias = grad.to(bias.dtype).flatten(0, -2).sum(0) if ctx.needs_input_grad[1] else None
    return grad, grad_bias, None


differentiate_once("bias_act", _backward, _setup_context)


def bias_act(x: Tensor, bias: Tensor | None = None, activation: str = "gelu") -> Tensor:
    """``activation(x + bias)``, differentiable once.

    Args:
        x: [..., width], float32, float64, float16 or bfloat16; what the first matrix of an MLP gives, without bias.
        bias: [width] or None, float32 (float64 for float64).
        activation: "gelu" (x times the normal distribution function of x) or "quick_gelu" (x sigmoid(1.702 x)).

    Returns:
        [..., width] in the type of ``x``, computed in float32 at least.

    Raises:
        ValueError: another activation, or a bias of another shape.
        TypeError: ``x`` or ``bias`` of another type.
    """
    check_tensors("bias_act", differentiable=True, x=x, bias=bias)
    quick = _check(x, bias, activation)
    load.ensure(x.device)
    return torch.ops.tpt_fast.bias_act(x, bias, quick)


def bias_act_(x: Tensor, bias: Tensor | None = None, activation: str = "gelu") -> Tensor:
    """:func:`bias_act` in the place of ``x``, which has to be contiguous, and is returned; not differentiable.

    No second tensor is allocated. Called by itself, again and again, it takes as long as :func:`bias_act`.

    Raises:
        ValueError, TypeError: as there, or an ``x`` that is not contiguous.
    """
    check_tensors("bias_act_", differentiable=False, x=x, bias=bias)
    quick = _check(x, bias, activation)
    if not x.is_contiguous():
        raise ValueError(f"x: expected a contiguous tensor, got strides {x.stride()}")
    load.ensure(x.device)
    torch.ops.tpt_fast.bias_act_(x, bias, quick)
    return x


def bias_act_backward(grad: Tensor, x: Tensor, bias: Tensor | None = None, activation: str = "gelu") -> Tensor:
    """Gradient with respect to ``x`` of :func:`bias_act`, from the gradient ``grad`` [..., width] of its result."""
    check_tensors("bias_act_backward", differentiable=False, grad=grad, x=x, bias=bias)
    quick = _check(x, bias, activation)
    if grad.shape != x.shape or grad.dtype != x.dtype:
        raise ValueError(f"grad: expected {x.dtype} {list(x.shape)}, got {grad.dtype} {list(grad.shape)}")
    load.ensure(x.device)
    return torch.ops.tpt_fast.bias_act_backward(grad, x, bias, quick)


def _check(x: Tensor, bias: Tensor | None, activation: str) -> bool:
    check_choice("activation", activation, ACTIVATIONS)
    if x.dtype not in FLOATING:
        raise TypeError(f"x: expected {' or '.join(map(str, FLOATING))}, got {x.dtype}")
    accumulate = accumulation_dtype(x.dtype)
    if not x.ndim:
        raise ValueError("x: expected [..., width], got []")
    if bias is not None and bias.dtype != accumulate:
        raise TypeError(f"bias: expected {accumulate} with x in {x.dtype}, got {bias.dtype}")
    if bias is not None and bias.shape != x.shape[-1:]:
        raise ValueError(f"bias: expected {list(x.shape[-1:])}, got {list(bias.shape)}")
    return activation == "quick_gelu"
