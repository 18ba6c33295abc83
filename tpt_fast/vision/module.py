"""The model's own image tower."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

VIEWS_AT_ONCE = 64


def replica(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Second module objects around the same weights (converted once where ``dtype`` differs), in evaluation mode and
    without gradients, so that the caller's model keeps its mode, its dtype and its requires_grad."""
    memo: dict[int, object] = {}
    for p in module.parameters():
        memo[id(p)] = nn.Parameter(p.detach().to(dtype), requires_grad=False)
    for b in module.buffers():
        memo[id(b)] = b.detach().to(dtype) if b.is_floating_point() else b.detach()
    return copy.deepcopy(module, memo).eval()


class ModuleTower:
    """Any image tower, by its own code."""

    name = "module"

    def __init__(self, visual: nn.Module, dtype: torch.dtype) -> None:
        self._visual = replica(visual, dtype)

    def at_once(self, device: torch.device) -> int:
        """Views of a group, which bounds the memory of a batch of images."""
        return VIEWS_AT_ONCE

    def encode(self, views: Tensor) -> Tensor:
        """[N, 3, S, S] -> [N, D], not normalised."""
        features = self._visual(views)
        return features[0] if isinstance(features, tuple) else features
