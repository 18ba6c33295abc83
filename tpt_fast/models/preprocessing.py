"""What an image tower expects of its images."""

from __future__ import annotations

from typing import NamedTuple

from torch import nn

from ..views.make import CLIP_MEAN, CLIP_STD


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
