"""torch's layers as weights of the towers, and what is known of the code that uses them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..ops._types import accumulation_dtype
from .matrix import Matrix
from .weights import Foreign, Linear, Norm, Unsupported

#: Top packages whose code is known here; the demo's model is our own.
KNOWN = ("open_clip", "torch", "torchvision", "tpt_fast")


def expect(condition: bool, reason: str) -> None:
    """
    Raises:
        Unsupported: ``condition`` does not hold, for this reason.
    """
    if not condition:
        raise Unsupported(reason)


def is_known(code: type | Callable, packages: tuple[str, ...] = KNOWN) -> bool:
    """Whether this class or function is one of a library whose code is known here."""
    return code.__module__.partition(".")[0] in packages


def expect_known_code(*parts: Foreign, packages: tuple[str, ...] = KNOWN) -> None:
    """For ``parts`` of a model that will be read instead of called.

    Raises:
        Unsupported: a module in them is of somebody else's class, or has a hook or a forward function of its own.
    """
    for name, module in _modules(parts):
        expect(is_known(type(module), packages), f"{_at(name, module)} is not {_owners(packages)}")
    expect_plain_calls(*parts)


def expect_plain_calls(*parts: Foreign) -> None:
    """
    Raises:
        Unsupported: a module in ``parts`` has a hook or a forward function of its own.
    """
    for name, module in _modules(parts):
        expect("forward" not in vars(module), f"{_at(name, module)} has a forward function of its own")
        expect(not module._forward_hooks and not module._forward_pre_hooks, f"{_at(name, module)} has hooks")


def _modules(parts: tuple[Foreign, ...]) -> list[tuple[str, nn.Module]]:
    return [found for part in parts for found in part.named_modules()]


def _at(name: str, module: nn.Module) -> str:
    return f"{name or 'a part of the tower'} ({type(module).__name__})"


def _owners(packages: tuple[str, ...]) -> str:
    return f"{packages[0]}'s or torch's"


def read_norm(layer: Foreign, dtype: torch.dtype, device: torch.device) -> Norm:
    """Weight, bias and epsilon of an ``nn.LayerNorm`` (or of a library's variant of it) on ``device``."""
    expect(isinstance(layer, nn.LayerNorm), f"a norm is a {type(layer).__name__}")
    accumulate = accumulation_dtype(dtype)
    width = layer.normalized_shape
    weight = torch.ones(width, device=device) if layer.weight is None else layer.weight.detach()
    bias = torch.zeros_like(weight) if layer.bias is None else layer.bias.detach()
    return Norm(weight.to(accumulate), bias.to(accumulate), layer.eps)


def read_linear(layer: Foreign, dtype: torch.dtype, scale: Foreign | None = None) -> Linear:
    """An ``nn.Linear``, with the LayerScale behind it if there is one."""
    expect(isinstance(layer, nn.Linear), f"a projection is a {type(layer).__name__}")
    weight, bias = layer.weight.detach(), layer.bias
    if not isinstance(scale, (nn.Identity, type(None))):
        expect(type(scale).__name__ == "LayerScale", f"a branch is scaled by a {type(scale).__name__}")
        gamma = scale.gamma.detach().to(accumulation_dtype(dtype))
        weight, bias = weight.to(dtype).to(gamma.dtype) * gamma[:, None], None if bias is None else bias * gamma
    return linear(weight, bias, dtype)


def linear(weight: Tensor, bias: Tensor | None, dtype: torch.dtype, bias_dtype: torch.dtype | None = None) -> Linear:
    """``weight`` and ``bias`` as they are stored."""
    matrix = Matrix(weight.detach().to(dtype))
    return Linear(matrix, None if bias is None else bias.detach().to(bias_dtype or accumulation_dtype(dtype)))


def read_patches(conv: Foreign, patch_size: tuple[int, int] | None = None) -> tuple[int, int]:
    """Height and width of the patches that a convolution embeds one by one.

    Raises:
        Unsupported: it does something else, or they are not of ``patch_size``.
    """
    plain = type(conv) is nn.Conv2d and conv.kernel_size == conv.stride == (patch_size or conv.kernel_size)
    if not plain or conv.groups != 1 or any(conv.padding) or set(conv.dilation) != {1}:
        raise Unsupported("the patches overlap, are padded or are not embedded by a plain convolution")
    height, width = conv.kernel_size
    return height, width
