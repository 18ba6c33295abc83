"""The model's own image tower."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..models.module import UnderAutocast, replica
from ..models.weights import Foreign

VIEWS_AT_ONCE = 64


class ModuleTower:
    """Any image tower, by its own code; with ``autocast`` under fp16 autocast, as the published code runs it."""

    name = "module"

    def __init__(self, visual: Foreign, dtype: torch.dtype, autocast: bool = False) -> None:
        self._visual = replica(visual, dtype)
        if autocast:
            self._visual = UnderAutocast(self._visual)

    def tensors(self) -> list[Tensor]:
        """What it holds."""
        return [*self._visual.parameters(), *self._visual.buffers()]

    def at_once(self, device: torch.device) -> int:
        """Views of a group, which bounds the memory of a batch of images."""
        return VIEWS_AT_ONCE

    def encode(self, views: Tensor) -> Tensor:
        """[N, 3, S, S] -> [N, D], not normalised."""
        features = self._visual(views)
        return features[0] if isinstance(features, tuple) else features


class EncodeImage(nn.Module):
    """``model.encode_image`` as an image tower."""

    def __init__(self, model: Foreign) -> None:
        super().__init__()
        self.model = model

    def forward(self, views: Tensor) -> Tensor:
        return self.model.encode_image(views)
