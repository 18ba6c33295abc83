"""View 0 of models whose images are fitted into the view and padded."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import ops
from .crops import INTERPOLATIONS


def fitted_view(
    pixels: Tensor,
    table: Tensor,
    size: tuple[int, int],
    vertical_first: bool,
    interpolation: str = "bicubic",
    fill: int = 0,
) -> Tensor:
    """The whole image, resized until it just fits, in the middle of a view of byte ``fill``: open_clip's
    ``ResizeKeepRatio(size, longest=1)`` and ``CenterCropOrPad(size, fill)``, to the bit.

    Args:
        pixels, table: as for :func:`tpt_fast.ops.views`.
        size: (H, W) of the view.
        interpolation: "bicubic" or "bilinear".

    Returns:
        [3, H, W] in the type of ``table``.

    Raises:
        ValueError: an image so long and narrow that nothing of its shorter side would be left.
    """
    (height, width, _), (view_height, view_width) = pixels.shape, size
    ratio = max(height / view_height, width / view_width)
    high, wide = round(height / ratio), round(width / ratio)
    if min(high, wide) == 0:
        raise ValueError(
            f"image: {height} x {width} (height x width) is too long and narrow: with its longer side resized to "
            f"{max(high, wide)} nothing of the shorter one is left"
        )
    row = [[0, 0, height, width, high, wide, 0, 0, 0, INTERPOLATIONS[interpolation]]]
    specs = torch.tensor(row, dtype=torch.int32, device="cpu").to(pixels.device, non_blocking=True)
    view = table[:, fill, None, None].repeat(1, view_height, view_width)
    top, left = (view_height - high) // 2, (view_width - wide) // 2
    view[:, top : top + high, left : left + wide] = ops.views(pixels, specs, table, (high, wide), vertical_first)[0]
    return view
