"""One place that defines ops in torch's library ``tpt_fast``.

An op is defined with its PyTorch reference as the implementation for every device. The compiled extension, once loaded,
puts its kernels in front of that for the CPU and CUDA, so an op exists and gives the same answer either way.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

_library = torch.library.Library("tpt_fast", "DEF")


def define(schema: str, reference: Callable, tags: Sequence[torch.Tag] = ()) -> None:
    """Define the op of ``schema``, e.g. ``"scale(Tensor x, float by) -> Tensor"``, with ``reference`` behind it."""
    _library.define(schema, tags=tags)
    _library.impl(schema.partition("(")[0], reference, "CompositeExplicitAutograd")


class _Once(torch.autograd.Function):
    """The identity, for a first derivative: a second one raises."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, op: str) -> Tensor:
        ctx.op = op
        return value.clone()

    @staticmethod
    def backward(ctx: Any, _grad: Tensor) -> Any:
        raise RuntimeError(f"{ctx.op} can be differentiated once only")


def differentiate_once(op: str, backward: Callable, setup_context: Callable) -> None:
    """Register the gradient of ``op``. Its kernels have no gradient of their own, so that a second derivative would be
    zero without a word; it raises instead."""

    def once(ctx: Any, *grads: Tensor) -> Any:
        twice = torch.is_grad_enabled()  # create_graph=True
        with torch.no_grad():
            results = backward(ctx, *grads)
        if not twice:
            return results
        return tuple(None if each is None else _Once.apply(each.detach().requires_grad_(), op) for each in results)

    torch.library.register_autograd(f"tpt_fast::{op}", once, setup_context=setup_context)


def check_tensors(op: str, *, differentiable: bool, **tensors: Tensor | None) -> None:
    """What every op asks of its tensors, the first of which is never None: dense ones, on one device, and no derivative
    that the op does not have, and that would be lost without a word.

    Raises:
        TypeError: not a tensor, or a sparse one.
        ValueError: tensors on several devices.
        RuntimeError: a tensor has a forward-mode tangent, or a gradient is wanted of an op that has none.
    """
    first, like = next(iter(tensors.items()))
    for name, tensor in tensors.items():
        if tensor is None and name != first:
            continue
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name}: expected a tensor, got {type(tensor).__name__}")
        if tensor.layout != torch.strided:
            raise TypeError(f"{name}: expected a dense tensor, got one of layout {tensor.layout}")
        if like is not None and tensor.device != like.device:
            raise ValueError(f"{name}: expected a tensor on {like.device}, as {first} is, got one on {tensor.device}")
        if not differentiable and tensor.requires_grad and torch.is_grad_enabled():
            raise RuntimeError(f"{name}: {op} has no derivative, and this tensor requires a gradient; detach it")
        if forward_ad._current_level >= 0 and forward_ad.unpack_dual(tensor).tangent is not None:
            raise RuntimeError(f"{name}: {op} has no forward-mode derivative, and this tensor has a tangent")


def check_form(name: str, tensor: Tensor, shape: tuple[str | int, ...], dtypes: tuple[torch.dtype, ...]) -> None:
    """Of a tensor with sizes ``shape``, letters standing for any, in one of ``dtypes``.

    Raises:
        ValueError: of another shape.
        TypeError: of another type.
    """
    sizes = zip(tensor.shape, shape, strict=False)
    if tensor.dim() != len(shape) or any(isinstance(want, int) and got != want for got, want in sizes):
        expected = ", ".join(map(str, shape))
        raise ValueError(f"{name}: expected shape [{expected}], got {list(tensor.shape)}")
    if tensor.dtype not in dtypes:
        raise TypeError(f"{name}: expected {' or '.join(map(str, dtypes))}, got {tensor.dtype}")


_library.define("build_info() -> str")


def build_info() -> str:
    """What the compiled extension says of itself; there must be one (``load.ensure().name == "native"``)."""
    return torch.ops.tpt_fast.build_info()
