"""The model's own image tower."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..models.module import UnderAutocast

VIEWS_AT_ONCE = 64


class ModuleTower:
    """Any image tower, by its own code, which :meth:`~tpt_fast.models.family.Family.for_images` gives; with
    ``autocast`` under fp16 autocast, as the published code runs it."""

    name = "module"

    def __init__(self, visual: nn.Module, autocast: bool = False) -> None:
        self._visual = UnderAutocast(visual) if autocast else visual

    def tensors(self) -> list[Tensor]:
        """What it holds."""
        return [*self._visual.parameters(), *self._visual.buffers()]

    def at_once(self, device: torch.device) -> int:
        """Views of a group, which bounds the memory of a batch of images."""
        return VIEWS_AT_ONCE

    def encode(self, views: Tensor) -> Tensor:
        """[N, 3, H, W] -> [N, D], not normalised."""
        return self._visual(views)
