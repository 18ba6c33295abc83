"""Views of an image in plain PyTorch: Pillow's 8-bit antialiased resampling, to the bit, on any device with float64."""

from __future__ import annotations

import torch
from torch import Tensor

WEIGHT_BITS = 22  #: fractional bits of Pillow's integer weights
FILTER_SUPPORT = (1.0, 2.0)  #: bilinear, bicubic


def _bilinear(x: Tensor) -> Tensor:
    return (1.0 - x).clamp_min(0.0)


def _bicubic(x: Tensor) -> Tensor:
    """Keys' cubic with a = -1/2, written in Pillow's order of operations."""
    inner = (1.5 * x - 2.5) * x * x + 1.0
    outer = (((x - 5.0) * x + 8.0) * x - 4.0) * -0.5
    return torch.where(x < 1.0, inner, torch.where(x < 2.0, outer, 0.0))


def resize_weights(
    filter: int, length: int, out_length: int, first: int, count: int, device: torch.device | str = "cpu"
) -> Tensor:
    """Weights of output pixels [first, first + count) of a resize from ``length`` to ``out_length`` pixels.

    Returns:
        [count, length] float64 holding integers, 2**22 standing for one.
    """
    scale = length / out_length
    support = FILTER_SUPPORT[filter] * max(1.0, scale)
    centre = (torch.arange(first, first + count, dtype=torch.float64, device=device) + 0.5) * scale
    low = (centre - support + 0.5).trunc().clamp_min(0.0)
    high = (centre + support + 0.5).trunc().clamp_max(length)
    taps = int((high - low).max())
    pixel = low[:, None] + torch.arange(taps, dtype=torch.float64, device=device)
    inside = pixel < high[:, None]
    distance = ((pixel - centre[:, None] + 0.5) * (1.0 / max(1.0, scale))).abs()
    raw = torch.where(inside, (_bicubic if filter else _bilinear)(distance), 0.0)
    total = torch.zeros_like(centre)
    for k in range(taps):  # one by one: another order would round differently
        total = total + raw[:, k]
    scaled = raw / total[:, None] * (1 << WEIGHT_BITS)
    fixed = torch.where(scaled < 0.0, scaled - 0.5, scaled + 0.5).trunc()
    dense = torch.zeros(count, length, dtype=torch.float64, device=device)
    return dense.scatter_add_(1, pixel.clamp_max(length - 1).long(), torch.where(inside, fixed, 0.0))


def _weighted(weights: Tensor, pixels: Tensor) -> Tensor:
    """``weights @ pixels`` rounded to bytes; every partial sum is an integer below 2**53, so float64 is exact."""
    sums = (weights @ pixels.flatten(1)).unflatten(1, pixels.shape[1:])
    return ((sums + (1 << (WEIGHT_BITS - 1))) / (1 << WEIGHT_BITS)).floor().clamp(0.0, 255.0)


def _view(image: Tensor, spec: list[int], high: int, wide: int, vertical_first_when_taller: bool) -> Tensor:
    top, left, height, width, out_height, out_width, window_top, window_left, flip, filter = spec
    pixels = image[top : top + height, left : left + width].double()
    vertical = resize_weights(filter, height, out_height, window_top, high, image.device)
    horizontal = resize_weights(filter, width, out_width, window_left, wide, image.device)
    if vertical_first_when_taller:  # Pillow >= 13
        vertical_first = height > out_height and height - out_height > 2 * (width - out_width)
    else:
        vertical_first = height > out_height and height > 100 * width
    if vertical_first:
        pixels = _weighted(horizontal, _weighted(vertical, pixels).transpose(0, 1)).transpose(0, 1)
    else:
        pixels = _weighted(vertical, _weighted(horizontal, pixels.transpose(0, 1)).transpose(0, 1))
    return (pixels.flip(1) if flip else pixels).permute(2, 0, 1)


def _check(image: Tensor, specs: list[list[int]], high: int, wide: int) -> None:
    image_height, image_width, _ = image.shape

    def inside(first: int, count: int, length: int) -> bool:
        return first >= 0 and count >= 1 and first + count <= length

    for row, (top, left, height, width, out_height, out_width, y, x, _, filter) in enumerate(specs):
        if not (inside(top, height, image_height) and inside(left, width, image_width)):
            raise ValueError(
                f"specs: expected boxes inside the image of {image_height} x {image_width} (height x width), "
                f"got {height} x {width} at ({top}, {left}) in row {row}"
            )
        if not (inside(y, high, out_height) and inside(x, wide, out_width)):
            raise ValueError(
                f"specs: expected windows of {high} x {wide} inside the resized box of {out_height} x {out_width}, "
                f"got one at ({y}, {x}) in row {row}"
            )
        if filter not in (0, 1):
            raise ValueError(f"specs: expected filter 0 or 1, got {filter} in row {row}")


def patches(views: Tensor, height: int, width: int) -> Tensor:
    """[N, C, H, W] -> [N, H / height * W / width, C * height * width]: patch by patch, channels first in each."""
    cut = views.unflatten(-1, (-1, width)).unflatten(-3, (-1, height))  # [N, C, rows, height, columns, width]
    return cut.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


def views(
    image: Tensor,
    specs: Tensor,
    table: Tensor,
    height: int,
    width: int,
    vertical_first_when_taller: bool = True,
    patch: int | None = None,
) -> Tensor:
    """Definition of :func:`tpt_fast.ops.views`, with the view's two sides for ``size``."""
    rows = specs.tolist()
    _check(image, rows, height, width)
    out = table.new_empty(len(rows), 3, height, width)
    for row, spec in enumerate(rows):
        pixels = _view(image, spec, height, width, vertical_first_when_taller)
        out[row] = table.gather(1, pixels.flatten(1).long()).unflatten(1, (height, width))
    return out if patch is None else patches(out, patch, patch)
