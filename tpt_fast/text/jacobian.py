"""The first gradient of every image as one matrix product.

All images start from the same context, where its gradient is linear in that of the class features: grad_ctx = sum over
classes of J_c^T g_c, with J_c = d features_c / d context [D, n_ctx W]. Made once, J takes the place of the text tower's
first backward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .._machine import free_bytes

Track = Callable[[Iterable[int]], Iterable[int]]


@dataclass(frozen=True)
class Jacobian:
    """Of U classes at one context; :class:`~tpt_fast.TextEncoder` takes it for the tape of its initial features."""

    rows: Tensor  #: float32 (float64 for a float64 tower) [U, D, n_ctx W]
    shape: torch.Size  #: of the context, [n_ctx, W] or class-specific [U, n_ctx, W]

    @classmethod
    def make(cls, bound: Any, features: Tensor, ctx: Tensor, specific: Tensor, track: Track) -> Jacobian:
        """By D backward passes, each for one entry of all classes' features.

        Args:
            bound: the tower with the class list and a context of each class's own: gradients come for each then.
            features: [U, D], whose shape is asked for.
            ctx: the context, as the encoder has it; specific: the same [U, n_ctx, W].
            track: passes on what it is given, showing progress.

        Raises:
            ValueError: it does not fit in memory.
        """
        (classes, wide), entries = features.shape, specific[0].numel()
        needed, free = classes * wide * entries * features.element_size(), free_bytes(ctx.device)
        if needed > free:
            raise ValueError(
                f"classnames: expected a list whose Jacobian fits in memory; of {classes} classes, {wide} features and "
                f"{entries} numbers of context it takes {needed / 1e9:.3g} GB, and {free / 1e9:.3g} are free"
            )
        rows = features.new_empty(classes, wide, entries)
        _, tape = bound.forward(specific, True)
        grad = torch.zeros_like(features)
        for entry in track(range(wide)):
            grad[:, entry] = 1
            rows[:, entry] = bound.backward(tape, grad).flatten(1)
            grad[:, entry] = 0
        return cls(rows, ctx.shape)

    def backward(self, grad: Tensor) -> Tensor:
        """Gradient of the context [.., *shape] from that of the features [.., U, D]; J is read once for all images."""
        if len(self.shape) == 3:
            found = (grad.transpose(0, -2).reshape(len(self.rows), -1, grad.shape[-1]) @ self.rows).transpose(0, 1)
        else:
            found = grad.reshape(-1, self.rows.shape[0] * self.rows.shape[1]) @ self.rows.flatten(0, 1)
        return found.reshape(*grad.shape[:-2], *self.shape)
