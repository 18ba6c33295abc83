"""Gradients through a tower of 16 bits."""

from __future__ import annotations

import torch
from torch import Tensor


def into_range(grad: Tensor, dtype: torch.dtype) -> Tensor | float:
    """The power of two by which the largest value of ``grad`` comes near 1, for a backward pass in 16 bits.

    That pass is linear, so nothing but the small numbers' rounding depends on it. 1 for other types.
    """
    if dtype not in (torch.float16, torch.bfloat16):
        return 1.0
    largest = grad.abs().amax()
    return torch.where(largest > 0, torch.exp2(-largest.log2().ceil()), 1.0).nan_to_num(1.0, 1.0, 1.0)
