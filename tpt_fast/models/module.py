"""A model's own modules, made second objects around the same weights."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn


def unwrapped(model: Any) -> Any:
    """The model inside of ``DataParallel``, ``DistributedDataParallel`` or ``torch.compile``, whose weights it has."""
    while True:
        if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            model = model.module
        elif isinstance(getattr(model, "_orig_mod", None), nn.Module):
            model = model._orig_mod
        else:
            return model


def replica(module: nn.Module, dtype: torch.dtype, left_out: nn.Module | None = None) -> nn.Module:
    """Second module objects around the same weights (converted once where ``dtype`` differs), in evaluation mode and
    without gradients, so that the caller's model keeps its mode, its dtype and its requires_grad.

    Args:
        left_out: a part of ``module`` that nothing will call.
    """

    def held(tensor: Tensor) -> Tensor:
        tensor = tensor.detach().to(dtype) if tensor.is_floating_point() else tensor.detach()
        return tensor.clone() if tensor.is_inference() else tensor  # autograd could not save it

    memo: dict[int, object] = {id(p): nn.Parameter(held(p), requires_grad=False) for p in module.parameters()}
    memo |= {id(b): held(b) for b in module.buffers()}
    if left_out is not None:
        memo[id(left_out)] = nn.Identity()
    return copy.deepcopy(module, memo).eval()


class UnderAutocast(nn.Module):
    """``module`` under fp16 autocast, wherever it is called from: a backward pass that computes again calls it too."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *arguments: Tensor) -> Tensor:
        with torch.autocast(arguments[0].device.type, torch.float16):
            return self.module(*arguments)
