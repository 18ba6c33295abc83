"""Crops of one image -> AugMix's views: three chains of operations on each, mixed after normalisation."""

from __future__ import annotations

import torch
from torch import Tensor

from .._checks import check_patch
from ..extension import load
from ..reference.augmix import CHAINS, PARAMETERS
from ..reference.augmix import augmix as reference
from ._library import check_form, check_tensors, define

define(
    "augmix(Tensor crops, Tensor steps, Tensor parameters, Tensor weights, Tensor table, Tensor(a!) out,"
    " int? patch=None) -> ()",
    reference,
)

_OUTPUTS = (torch.float32, torch.float16, torch.bfloat16)


@torch.library.register_fake("tpt_fast::augmix")
def _fake(crops, steps, parameters, weights, table, out, patch=None):
    return None


def augmix(
    crops: Tensor,
    steps: Tensor,
    parameters: Tensor,
    weights: Tensor,
    table: Tensor,
    dtype: torch.dtype = torch.float32,
    patch: int | None = None,
) -> Tensor:
    """AugMix's mixtures of crops, equal to the bit to Pillow's operations on them and float32 arithmetic after them.

    Each crop goes through three chains of steps, each from the crop itself. Then, in float32 with every product and
    sum rounded by itself, mix = w_1 n(chain 1) + w_2 n(chain 2) + w_3 n(chain 3) and view = m n(crop) + (1 - m) mix;
    n is the normalisation of ``table``.

    Args:
        crops: uint8 [N, 3, H, W], each side in 1..32768, as :func:`tpt_fast.ops.views` makes them of a table of bytes.
        steps: int32 [N, 3, D], the steps of each chain in their order: 0 nothing, 1 autocontrast, 2 equalize (both of
            each channel by itself), 3 posterize, 4 solarize, 5 an affine transform (bilinear, black beyond the image).
        parameters: float64 [N, 3, D, 6], what a step needs: posterize the number of bits in 0..8, and solarize the
            threshold from which on bytes are inverted, both first; affine a to f, the source of output pixel (x, y)
            being (a x + b y + c, d x + e y + f) of pixels' centres, which lie at halves. What is not finite is black.
        weights: float32 [N, 4]: m, w_1, w_2, w_3.
        table: float32 [3, 256]: the normalised value of each byte of each channel, see
            :func:`tpt_fast.views.make.normalisation_table`.
        dtype: of the views: float32, float16 or bfloat16, rounded from float32.
        patch: P, a divisor of H and W: write the views cut into patches, as :func:`tpt_fast.ops.views` does.

    Returns:
        [N, 3, H, W] in ``dtype``; with ``patch`` [N, H / P * W / P, 3 P^2].

    Raises:
        ValueError: a shape or a size out of range.
        TypeError: a tensor or output of another type.
        ValueError or RuntimeError: a step or number of bits out of range (by the reference or the compiled kernel for
            the CPU; on CUDA, where looking would mean waiting for the device, such a step does nothing, and such a
            number is cut to the range).
    """
    check_tensors(
        "augmix",
        differentiable=False,
        crops=crops,
        steps=steps,
        parameters=parameters,
        weights=weights,
        table=table,
    )
    check_form("crops", crops, ("N", 3, "H", "W"), (torch.uint8,))
    count, _, height, width = crops.shape
    if not (1 <= height <= 1 << 15 and 1 <= width <= 1 << 15):
        raise ValueError(f"crops: expected 1 to 32768 pixels a side, got {height} x {width}")
    check_form("steps", steps, (count, CHAINS, "D"), (torch.int32,))
    check_form("parameters", parameters, (*steps.shape, PARAMETERS), (torch.float64,))
    check_form("weights", weights, (count, 1 + CHAINS), (torch.float32,))
    check_form("table", table, (3, 256), (torch.float32,))
    if dtype not in _OUTPUTS:
        raise TypeError(f"dtype: expected {' or '.join(map(str, _OUTPUTS))}, got {dtype}")
    check_patch(patch, height, width)
    load.ensure(crops.device)
    shape = (3, height, width) if patch is None else (height // patch * (width // patch), 3 * patch**2)
    out = crops.new_empty((count, *shape), dtype=dtype)
    torch.ops.tpt_fast.augmix(crops, steps, parameters, weights, table, out, patch)
    return out
