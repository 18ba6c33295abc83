"""One image -> all its views: crop, antialiased resize, window, flip, normalise."""

from __future__ import annotations

import torch
from torch import Tensor

from .._checks import check_patch, check_size
from ..extension import load
from ..reference.views import views as reference
from ._library import check_form, check_tensors, define

SPEC_COLUMNS = 10

define(
    "views(Tensor image, Tensor specs, Tensor table, int height, int width, bool vertical_first_when_taller=True,"
    " int? patch=None) -> Tensor",
    reference,
)


@torch.library.register_fake("tpt_fast::views")
def _fake(image, specs, table, height, width, vertical_first_when_taller=True, patch=None):
    if patch is None:
        return table.new_empty(specs.shape[0], 3, height, width)
    return table.new_empty(specs.shape[0], height // patch * (width // patch), 3 * patch**2)


def views(
    image: Tensor,
    specs: Tensor,
    table: Tensor,
    size: int | tuple[int, int],
    vertical_first_when_taller: bool = True,
    patch: int | None = None,
) -> Tensor:
    """All views of one image, equal to the bit to torchvision's transforms of the PIL image.

    Args:
        image: uint8 [H, W, 3].
        specs: int32 [N, 10], a view a row: top, left, height, width, out_height, out_width, window_top, window_left,
            flip, filter. The box at (top, left) of ``height`` x ``width`` pixels is cropped, resized to
            ``out_height`` x ``out_width`` (filter 0: bilinear, 1: bicubic; antialiased; nothing outside the box bleeds
            in), cut to the window of the view's size at (window_top, window_left) and mirrored if ``flip`` is not 0.
            Boxes must lie inside the image and windows inside the resized box: checked for specs on the CPU; on CUDA,
            where looking would mean waiting for the device, a spec that is not so is undefined.
        table: [3, 256], float32, float16, bfloat16 or uint8: the output value of each byte of each channel, i.e. the
            normalisation (see :func:`tpt_fast.views.make.normalisation_table`).
        size: S, or (VH, VW) of the views, each in 1..32768.
        vertical_first_when_taller: the pass order of Pillow >= 13, which resizes the height first exactly where
            ``height > out_height`` and ``height - out_height > 2 * (width - out_width)``. False: the order before
            Pillow 13, which does so only where ``height > out_height`` and ``height > 100 * width``. Both passes round
            to bytes, so the order shows in the last bit.
        patch: P, a divisor of VH and VW: write the views cut into patches of P x P, row by row, channels first in
            each: the rows of the matrix product in which a vision transformer's convolution of that size and stride
            consists.

    Returns:
        [N, 3, VH, VW] in the type of ``table``; with ``patch`` [N, VH / P * VW / P, 3 P^2].

    Raises:
        ValueError: a shape or a size out of range.
        TypeError: a tensor of another type.
        ValueError or RuntimeError: a box or window out of range (by the reference or the compiled kernel).
    """
    check_tensors("views", differentiable=False, image=image, specs=specs, table=table)
    check_form("image", image, ("H", "W", 3), (torch.uint8,))
    check_form("specs", specs, ("N", SPEC_COLUMNS), (torch.int32,))
    check_form("table", table, (3, 256), (torch.float32, torch.float16, torch.bfloat16, torch.uint8))
    view_height, view_width = check_size("size", size)
    check_patch(patch, view_height, view_width)
    load.ensure(image.device)
    return torch.ops.tpt_fast.views(image, specs, table, view_height, view_width, vertical_first_when_taller, patch)
