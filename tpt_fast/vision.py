"""The image tower: normalised views -> normalised features."""

from __future__ import annotations

import copy
from typing import NamedTuple

import torch
from torch import Tensor, nn

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


class Preprocessing(NamedTuple):
    """What the model expects of an image: square side in pixels, and the mean and deviation of each channel."""

    size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


def preprocessing(model: nn.Module) -> Preprocessing:
    """Read off the model; CLIP's own mean and deviation where it does not say.

    Raises:
        TypeError: the model has no image tower.
        ValueError: its images are not square.
    """
    visual = getattr(model, "visual", None)
    if not isinstance(visual, nn.Module):
        raise TypeError(f"model: expected an open_clip model with an image tower, got {type(model).__name__}")
    size = getattr(visual, "image_size", 224)
    height, width = size if isinstance(size, (tuple, list)) else (size, size)
    if height != width:
        raise ValueError(f"model: expected square images, got an image tower for {height} x {width}")
    mean = getattr(visual, "image_mean", None) or CLIP_MEAN
    std = getattr(visual, "image_std", None) or CLIP_STD
    return Preprocessing(int(height), tuple(mean), tuple(std))


def replica(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Second module objects around the same weights (converted once where ``dtype`` differs), in evaluation mode and
    without gradients, so that the caller's model keeps its mode, its dtype and its requires_grad."""
    memo: dict[int, object] = {}
    for p in module.parameters():
        memo[id(p)] = nn.Parameter(p.detach().to(dtype), requires_grad=False)
    for b in module.buffers():
        memo[id(b)] = b.detach().to(dtype) if b.is_floating_point() else b.detach()
    return copy.deepcopy(module, memo).eval()


class ImageEncoder:
    """The image tower of ``model`` with its weights in ``dtype``."""

    engine = "module"

    def __init__(self, model: nn.Module, dtype: torch.dtype) -> None:
        preprocessing(model)
        self.dtype = dtype
        self._visual = replica(model.visual, dtype)

    @torch.no_grad()
    def encode(self, views: Tensor) -> Tensor:
        """[N, 3, S, S] normalised views -> [N, D] features of length 1, float32 (float64 for a float64 tower)."""
        features = self._visual(views.to(self.dtype))
        features = features[0] if isinstance(features, tuple) else features
        features = features if features.dtype == torch.float64 else features.float()
        return nn.functional.normalize(features, dim=-1)
