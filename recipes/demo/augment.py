"""Random views of a batch, as tensor operations on the whole batch: cheap enough not to be noticed beside a step."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .captions import LOOKS


def random_views(images: Tensor, min_scale: float, clear: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Random crops, flips and looks.

    images: uint8 [B, H, W, 3]. ``min_scale``: smallest crop area as a fraction of the image; a quarter of the images
    stay uncropped, because that is how the model is asked at test time. ``clear``: fraction of images left without a
    look. Returns float32 [B, 3, H, W] in 0..1 and the look of each image, int64 [B], an index into ``LOOKS``.
    """
    x = images.permute(0, 3, 1, 2).float().div_(255)
    x = _crop_and_flip(x, min_scale, generator)
    return _apply_looks(x, clear, generator)


def _crop_and_flip(x: Tensor, min_scale: float, generator: torch.Generator) -> Tensor:
    batch = len(x)
    u = torch.rand(6, batch, generator=generator)
    area = min_scale + (1 - min_scale) * u[0]
    ratio = torch.exp((u[1] - 0.5) * 2 * torch.log(torch.tensor(4 / 3)))
    size = torch.stack([(area * ratio).sqrt(), (area / ratio).sqrt()]).clamp_(max=1)
    size = torch.where(u[5] < 0.25, 1.0, size)
    centre = (u[2:4] * 2 - 1) * (1 - size)
    flip = torch.where(u[4] < 0.5, -1.0, 1.0)
    theta = torch.zeros(batch, 2, 3)
    theta[:, 0, 0], theta[:, 1, 1] = size[0] * flip, size[1]
    theta[:, :, 2] = centre.T
    grid = F.affine_grid(theta, list(x.shape), align_corners=False)
    return F.grid_sample(x, grid, mode="bilinear", padding_mode="border", align_corners=False)


def _apply_looks(x: Tensor, clear: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    batch = len(x)
    u = torch.rand(6, batch, generator=generator)
    names = list(LOOKS)
    look = torch.where(u[0] < clear, names.index("clear"), 1 + (u[1] * (len(names) - 1)).long())
    strength = u[2].view(-1, 1, 1, 1)
    chosen = {name: look == i for i, name in enumerate(names)}

    # Every image gets a little of this; the looks below are clearly stronger.
    contrast = 0.8 + 0.4 * u[3].view(-1, 1, 1, 1)
    brightness = (u[4].view(-1, 1, 1, 1) - 0.5) * 0.2
    mean = x.mean((1, 2, 3), keepdim=True)
    x = (x - mean) * contrast + mean + brightness

    if (m := chosen["blurry"]).any():
        tap = 0.15 + 0.18 * u[2][m]
        row = torch.stack([tap, 1 - 2 * tap, tap], 1)
        kernel = (row[:, :, None] * row[:, None, :]).repeat_interleave(3, 0).unsqueeze(1)
        flat = F.pad(x[m], (1, 1, 1, 1), mode="replicate").flatten(0, 1).unsqueeze(0)
        x[m] = F.conv2d(flat, kernel, groups=flat.shape[1]).view_as(x[m])
    if (m := chosen["noisy"]).any():
        x[m] += torch.randn(x[m].shape, generator=generator) * (0.03 + 0.07 * strength[m])
    if (m := chosen["dark"]).any():
        x[m] *= 0.7 - 0.4 * strength[m]
    if (m := chosen["bright"]).any():
        x[m] = 1 - (1 - x[m]) * (0.7 - 0.4 * strength[m])
    return x.clamp_(0, 1), look
