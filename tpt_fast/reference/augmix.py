"""AugMix in plain PyTorch: Pillow's tables and bilinear affine transform, to the bit, on any device with float64."""

from __future__ import annotations

import torch
from torch import Tensor

from .views import patches

CHAINS = 3  #: of a view
NOTHING, AUTOCONTRAST, EQUALIZE, POSTERIZE, SOLARIZE, AFFINE = range(6)  #: steps of a chain
PARAMETERS = 6  #: of a step: an affine one's matrix, a posterize's bits, a solarize's threshold


def _levels(device: torch.device) -> Tensor:
    return torch.arange(256, dtype=torch.float64, device=device)


def _autocontrast(counts: Tensor) -> Tensor:
    levels, (present,) = _levels(counts.device), counts.nonzero(as_tuple=True)
    low, high = int(present[0]), int(present[-1])
    if high <= low:
        return levels
    scale = 255.0 / (high - low)
    return (levels * scale + -low * scale).trunc().clamp(0, 255)


def _equalize(counts: Tensor) -> Tensor:
    (present,) = counts.nonzero(as_tuple=True)
    step = int(counts.sum() - counts[present[-1]]) // 255
    if step == 0:  # also where there is one level only
        return _levels(counts.device)
    return ((step // 2 + counts.cumsum(0) - counts) // step).clamp_max(255).double()


def _affine(image: Tensor, matrix: list[float]) -> Tensor:
    """[3, H, W] float64, the source of (x, y) being (a x + b y + c, d x + e y + f); black beyond the image."""
    a, b, c, d, e, f = matrix
    height, width = image.shape[-2:]
    down, across = (torch.arange(side, dtype=torch.float64, device=image.device) + 0.5 for side in (height, width))
    x = (a * across + (b * down)[:, None]) + c
    y = (d * across + (e * down)[:, None]) + f
    inside = (x >= 0) & (x < width) & (y >= 0) & (y < height)
    x, y = x.where(inside, 0.5) - 0.5, y.where(inside, 0.5) - 0.5
    left, top = x.floor(), y.floor()

    def at(down: int, right: int) -> Tensor:
        rows, columns = (top + down).clamp(0, height - 1), (left + right).clamp(0, width - 1)
        return image[:, rows.long(), columns.long()]

    upper, lower = (at(down, 0) + (at(down, 1) - at(down, 0)) * (x - left) for down in (0, 1))
    return (upper + (lower - upper) * (y - top)).trunc() * inside


def step(image: Tensor, kind: int, parameters: list[float]) -> Tensor:
    """One step of a chain on [3, H, W] float64 holding bytes."""
    if kind == NOTHING:
        return image
    if kind == AFFINE:
        return _affine(image, parameters)
    if kind == POSTERIZE:
        table = (_levels(image.device).long() & ~(2 ** (8 - int(parameters[0])) - 1)).double()
        tables = table.expand(3, 256)
    elif kind == SOLARIZE:
        levels = _levels(image.device)
        tables = levels.where(levels < parameters[0], 255 - levels).expand(3, 256)
    else:
        of_counts = _autocontrast if kind == AUTOCONTRAST else _equalize
        tables = torch.stack([of_counts(torch.bincount(channel.flatten().long(), minlength=256)) for channel in image])
    return tables.gather(1, image.flatten(1).long()).view_as(image)


def _check(steps: list, parameters: list) -> None:
    for view, (kinds, values) in enumerate(zip(steps, parameters)):
        for chain, row in enumerate(zip(kinds, values)):
            for place, (kind, given) in enumerate(zip(*row)):
                where = f"in step {place} of chain {chain} of view {view}"
                if not NOTHING <= kind <= AFFINE:
                    raise ValueError(f"steps: expected {NOTHING} to {AFFINE}, got {kind} {where}")
                if kind == POSTERIZE and not 0 <= given[0] <= 8:
                    raise ValueError(f"parameters: expected 0 to 8 bits to posterize to, got {given[0]:g} {where}")


def augmix(
    crops: Tensor,
    steps: Tensor,
    parameters: Tensor,
    weights: Tensor,
    table: Tensor,
    out: Tensor,
    patch: int | None = None,
) -> None:
    """Definition of :func:`tpt_fast.ops.augmix`, which allocates ``out``."""
    rows, values = steps.tolist(), parameters.tolist()
    _check(rows, values)

    def normalised(image: Tensor) -> Tensor:
        return table.gather(1, image.flatten(1).long()).view_as(image)

    mixed = table.new_empty(crops.shape)
    for view, crop in enumerate(crops):
        own, *others = weights[view]
        mixture = torch.zeros_like(mixed[view])
        for weight, kinds, given in zip(others, rows[view], values[view], strict=True):
            image = crop.double()
            for kind, of_kind in zip(kinds, given, strict=True):
                image = step(image, kind, of_kind)
            mixture = mixture + weight * normalised(image)
        mixed[view] = own * normalised(crop) + (1 - own) * mixture
    out.copy_(mixed if patch is None else patches(mixed, patch, patch))
