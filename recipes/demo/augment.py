"""Random views of a batch, as tensor operations on the whole batch: cheap enough not to be noticed beside a step.

Each image gets one of ``LOOKS``: it stays clear, or it is made blurry, noisy, dark and so on. The captions of the look
(``captions.py``) are true of it, so the words around a class name carry meaning.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from open_clip.constants import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
from torch import Tensor

MEAN = torch.tensor(OPENAI_DATASET_MEAN).view(3, 1, 1)
STD = torch.tensor(OPENAI_DATASET_STD).view(3, 1, 1)
WHOLE = 0.2  # of the images stay uncropped, because that is how the model is asked at test time


def plain(images: Tensor, size: int) -> Tensor:
    """uint8 [B, H, W, 3] -> normalised float32 [B, 3, size, size], channels last: the image as it is, bicubic."""
    x = images.permute(0, 3, 1, 2).float().div_(255)
    if x.shape[-1] != size:
        x = F.interpolate(x, (size, size), mode="bicubic", antialias=True).clamp_(0, 1)
    return ((x - MEAN) / STD).contiguous(memory_format=torch.channels_last)


def random_views(
    images: Tensor, size: int, areas: tuple[float, float], look: Tensor, generator: torch.Generator
) -> Tensor:
    """Random crops and flips, a little colour jitter, and the look of each image.

    images: uint8 [B, H, W, 3]; areas: smallest and largest crop, as fractions of the image; look: int64 [B], indices
    into ``LOOKS``. Returns normalised float32 [B, 3, size, size], channels last.
    """
    x = images.permute(0, 3, 1, 2).float().div_(255)
    x = _jitter(_crop_and_flip(x, size, areas, generator), generator)
    strength = torch.rand(len(x), 1, 1, 1, generator=generator)
    for i, apply in enumerate(LOOKS.values()):
        if (chosen := look == i).any():
            x[chosen] = apply(x[chosen], strength[chosen], generator)
    return ((x.clamp_(0, 1) - MEAN) / STD).contiguous(memory_format=torch.channels_last)


def draw_looks(count: int, clear: float, generator: torch.Generator) -> Tensor:
    """A look for each of ``count`` images, int64: "clear" with probability ``clear``, the others equally often."""
    u = torch.rand(2, count, generator=generator)
    return torch.where(u[0] < clear, 0, 1 + (u[1] * (len(LOOKS) - 1)).long())


def _crop_and_flip(x: Tensor, size: int, areas: tuple[float, float], generator: torch.Generator) -> Tensor:
    batch = len(x)
    u = torch.rand(6, batch, generator=generator)
    area = areas[0] + (areas[1] - areas[0]) * u[0]
    ratio = torch.exp((u[1] - 0.5) * 2 * math.log(4 / 3))
    side = torch.stack([(area * ratio).sqrt(), (area / ratio).sqrt()]).clamp_(max=1)
    if areas[1] == 1:
        side = torch.where(u[5] < WHOLE, 1.0, side)
    centre = (u[2:4] * 2 - 1) * (1 - side)
    theta = torch.zeros(batch, 2, 3)
    theta[:, 0, 0], theta[:, 1, 1] = side[0] * torch.where(u[4] < 0.5, -1.0, 1.0), side[1]
    theta[:, :, 2] = centre.T
    grid = F.affine_grid(theta, [batch, 3, size, size], align_corners=False)
    return F.grid_sample(x, grid, mode="bilinear", padding_mode="border", align_corners=False)


def _jitter(x: Tensor, generator: torch.Generator) -> Tensor:
    """Contrast and brightness, for every image; the looks are clearly stronger."""
    u = torch.rand(2, len(x), 1, 1, 1, generator=generator)
    mean = x.mean((1, 2, 3), keepdim=True)
    return (x - mean) * (0.75 + 0.5 * u[0]) + mean + (u[1] - 0.5) * 0.2


# --- looks: [B, 3, S, S] in about 0..1, strengths [B, 1, 1, 1] in 0..1 ------------------------------------------------


def _blurry(x: Tensor, strength: Tensor, generator: torch.Generator) -> Tensor:
    sigma = (0.012 + 0.03 * strength.flatten()) * x.shape[-1]
    taps = torch.exp(-0.5 * (torch.arange(-6, 7) / sigma[:, None]) ** 2)
    taps = (taps / taps.sum(1, keepdim=True)).repeat_interleave(3, 0)
    flat = F.pad(x, (6, 6, 6, 6), mode="replicate").flatten(0, 1)[None]
    channels = flat.shape[1]
    flat = F.conv2d(flat, taps.view(channels, 1, 13, 1), groups=channels)
    return F.conv2d(flat, taps.view(channels, 1, 1, 13), groups=channels).view_as(x)


def _noisy(x: Tensor, strength: Tensor, generator: torch.Generator) -> Tensor:
    return x + torch.randn(x.shape, generator=generator) * (0.03 + 0.12 * strength)


def _dark(x: Tensor, strength: Tensor, generator: torch.Generator) -> Tensor:
    return x * (0.7 - 0.45 * strength)


def _bright(x: Tensor, strength: Tensor, generator: torch.Generator) -> Tensor:
    return 1 - (1 - x) * (0.7 - 0.45 * strength)


def _pixelated(x: Tensor, strength: Tensor, generator: torch.Generator) -> Tensor:
    factor = 0.25 if torch.rand((), generator=generator) < 0.5 else 0.375
    return F.interpolate(F.interpolate(x, scale_factor=factor, mode="area"), x.shape[-2:], mode="nearest")


def _grey(x: Tensor, strength: Tensor, generator: torch.Generator) -> Tensor:
    return (x * torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)).sum(1, keepdim=True).expand_as(x)


LOOKS: dict[str, Callable[[Tensor, Tensor, torch.Generator], Tensor]] = {
    "clear": lambda x, strength, generator: x,
    "blurry": _blurry,
    "noisy": _noisy,
    "dark": _dark,
    "bright": _bright,
    "pixelated": _pixelated,
    "grey": _grey,
}
