"""View 0 of models whose images are fitted into the square and padded."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import ops
from .crops import INTERPOLATIONS


def fitted_view(
    pixels: Tensor, table: Tensor, size: int, vertical_first: bool, interpolation: str = "bicubic", fill: int = 0
) -> Tensor:
    """The whole image, its longer side resized to ``size``, in the middle of a square of byte ``fill``: open_clip's
    ``ResizeKeepRatio(size, longest=1)`` and ``CenterCropOrPad(size, fill)``, to the bit.

    Args:
        pixels, table: as for :func:`tpt_fast.ops.views`, which makes square windows inside of a resized image: here as
            many as lie beside each other.
        interpolation: "bicubic" or "bilinear".

    Returns:
        [3, S, S] in the type of ``table``.

    Raises:
        ValueError: an image so long and narrow that nothing of its shorter side would be left.
    """
    height, width, _ = pixels.shape
    ratio = max(height / size, width / size)
    high, wide = round(height / ratio), round(width / ratio)
    side = min(high, wide)
    if side == 0:
        raise ValueError(
            f"image: {height} x {width} (height x width) is too long and narrow: with its longer side resized to "
            f"{size} nothing of the shorter one is left"
        )
    starts = [min(start, size - side) for start in range(0, size, side)]
    tops, lefts = (starts, [0]) if high > wide else ([0], starts)
    places = [(top, left) for top in tops for left in lefts]
    rows = [(0, 0, height, width, high, wide, *place, 0, INTERPOLATIONS[interpolation]) for place in places]
    specs = torch.tensor(rows, dtype=torch.int32, device="cpu").to(pixels.device, non_blocking=True)
    square = table[:, fill, None, None].repeat(1, size, size)
    down, right = (size - high) // 2, (size - wide) // 2
    for (top, left), window in zip(places, ops.views(pixels, specs, table, side, vertical_first), strict=True):
        square[:, down + top : down + top + side, right + left : right + left + side] = window
    return square
