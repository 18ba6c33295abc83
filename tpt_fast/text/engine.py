"""What an engine of the text tower offers."""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor

#: Opaque to callers; holds what ``backward`` needs. Read only, so threads and images may share one.
Tape = Any


class Engine(Protocol):
    """Forward and backward of one class list, for one context [n_ctx, W] (class-specific: [C, n_ctx, W])."""

    name: str

    def forward(self, ctx: Tensor, keep: bool) -> tuple[Tensor, Tape | None]:
        """Normalised features [C, D], and with ``keep`` the tape for :meth:`backward`."""

    def backward(self, tape: Tape, grad: Tensor) -> Tensor:
        """d / d ctx, from the gradient of the features [C, D]."""

    def describe(self) -> dict[str, Any]:
        """Sizes and choices, for reports."""
