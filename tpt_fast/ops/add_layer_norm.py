"""Residual add and LayerNorm in one pass over the rows."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..extension import load
from ..reference import add_layer_norm as reference
from ._library import check_tensors, define, differentiate_once
from ._types import FLOATING, accumulation_dtype

define(
    "add_layer_norm(Tensor x, Tensor? delta, Tensor? delta_bias, Tensor weight, Tensor bias, float eps)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    reference.add_layer_norm,
)
define(
    "add_layer_norm_backward(Tensor grad_normed, Tensor? grad_sum, Tensor sum, Tensor mean, Tensor rstd, Tensor weight)"
    " -> Tensor",
    reference.add_layer_norm_backward,
)


class AddLayerNorm(NamedTuple):
    """What :func:`add_layer_norm` returns."""

    sum: Tensor  #: [..., width] x + delta + delta_bias in the type of x; x itself without delta
    normed: Tensor  #: [..., width] LayerNorm of it, in the type of x
    mean: Tensor  #: [...] of each row of sum, float32 (float64 for float64)
    rstd: Tensor  #: [...] 1 / sqrt(variance + eps) of each row


@torch.library.register_fake("tpt_fast::add_layer_norm")
def _fake(x, delta, delta_bias, weight, bias, eps):
    statistics = x.new_empty(x.shape[:-1], dtype=accumulation_dtype(x.dtype))
    total = x.new_empty(0 if delta is None else x.shape)
    return total, x.new_empty(x.shape), statistics, torch.empty_like(statistics)


@torch.library.register_fake("tpt_fast::add_layer_norm_backward")
def _fake_backward(grad_normed, grad_sum, sum, mean, rstd, weight):
    return sum.new_empty(sum.shape)


def _setup_context(ctx: Any, inputs: Any, output: Any) -> None:
    x, delta, _, weight, _, _ = inputs
    total, _, mean, rstd = output
    ctx.added = delta is not None
    ctx.mark_non_differentiable(mean, rstd, *(() if ctx.added else (total,)))
    ctx.save_for_backward(total if ctx.added else x, mean, rstd, weight)


def _backward(ctx, grad_sum, grad_normed, _grad_mean, _grad_rstd):
    total, mean, rstd, weight = ctx.saved_tensors
    grad_sum = grad_sum if ctx.added else None
    grad = torch.ops.tpt_fast.add_layer_norm_backward(grad_normed, grad_sum, total, mean, rstd, weight)
    needs = ctx.needs_input_grad
    wide = grad_normed.to(weight.dtype)
    normalised = (total - mean.unsqueeze(-1)) * rstd.unsqueeze(-1) if needs[3] else None
    return (
        grad,
        grad if needs[1] else None,
        _over_rows(grad.to(weight.dtype)) if needs[2] else None,
        _over_rows(wide * normalised) if needs[3] else None,
        _over_rows(wide) if needs[4] else None,
        None,
    )


def _over_rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1]).sum(0)


differentiate_once("add_layer_norm", _backward, _setup_context)


def add_layer_norm(
    x: Tensor,
    delta: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float = 1e-5,
    *,
    delta_bias: Tensor | None = None,
) -> AddLayerNorm:
    """``sum = x + delta + delta_bias`` and ``normed = LayerNorm(sum) * weight + bias``, differentiable once.

    Args:
        x: [..., width] residual rows, float32, float64, float16 or bfloat16.
        delta: [..., width] in the type of ``x``, what a branch adds, or None.
        weight, bias: [width], float32 (float64 for float64).
        eps: added to the variance.
        delta_bias: [width] like ``weight``: the bias of the branch's last matrix, added here.

    Returns:
        :class:`AddLayerNorm`. Statistics are in float32 at least, and taken of ``sum`` as it is stored.

    Raises:
        ValueError, TypeError: an argument of another shape or type.
    """
    check_tensors(
        "add_layer_norm", differentiable=True, x=x, delta=delta, weight=weight, bias=bias, delta_bias=delta_bias
    )
    _check(x, "x", x, rows=True)
    _check(weight, "weight", x)
    _check(bias, "bias", x)
    if delta is not None:
        _check(delta, "delta", x, rows=True)
    if delta_bias is not None:
        _check(delta_bias, "delta_bias", x)
        if delta is None:
            raise ValueError("delta_bias: expected None without delta")
    load.ensure(x.device)
    outputs = torch.ops.tpt_fast.add_layer_norm(x, delta, delta_bias, weight, bias, eps)
    return AddLayerNorm(x if delta is None else outputs[0], *outputs[1:])


def add_layer_norm_backward(
    grad_normed: Tensor, grad_sum: Tensor | None, sum: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor
) -> Tensor:
    """Gradient with respect to ``x`` and ``delta`` alike, [..., width].

    Args:
        grad_normed: [..., width] gradient of ``normed``.
        grad_sum: [..., width] gradient that reaches ``sum`` by other ways (the residual stream), or None.
        sum, mean, rstd: as :func:`add_layer_norm` returned them.
        weight: [width].
    """
    check_tensors(
        "add_layer_norm_backward",
        differentiable=False,
        grad_normed=grad_normed,
        grad_sum=grad_sum,
        sum=sum,
        mean=mean,
        rstd=rstd,
        weight=weight,
    )
    _check(sum, "sum", sum, rows=True)
    _check(grad_normed, "grad_normed", sum, rows=True)
    _check(weight, "weight", sum)
    for name, t in (("mean", mean), ("rstd", rstd)):
        if t.dtype != weight.dtype or t.numel() * sum.shape[-1] != sum.numel():
            expected = f"{weight.dtype} {list(sum.shape[:-1])}"
            raise ValueError(f"{name}: expected {expected}, got {t.dtype} {list(t.shape)}")
    if grad_sum is not None:
        _check(grad_sum, "grad_sum", sum, rows=True)
    load.ensure(sum.device)
    return torch.ops.tpt_fast.add_layer_norm_backward(grad_normed, grad_sum, sum, mean, rstd, weight)


def _check(t: Tensor, name: str, x: Tensor, rows: bool = False) -> None:
    shape, dtype = (x.shape, x.dtype) if rows else (x.shape[-1:], accumulation_dtype(x.dtype))
    if x.dtype not in FLOATING or t.dtype != dtype:
        expected = dtype if x.dtype in FLOATING else " or ".join(map(str, FLOATING))
        raise TypeError(f"{name}: expected {expected}, got {t.dtype}")
    if t.shape != shape or not shape:
        raise ValueError(f"{name}: expected {list(shape) or '[..., width]'}, got {list(t.shape)}")
