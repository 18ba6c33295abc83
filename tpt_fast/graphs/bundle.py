"""Tensors laid end to end in one, so that a single copy takes them all from a device."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Bundle:
    """See :meth:`of`."""

    data: Tensor  # uint8 [bytes of all]
    layout: tuple[tuple[str, torch.dtype, torch.Size], ...]

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> Bundle:
        """Bundle ``tensors`` of one device, none of them 0-dimensional; nothing waits for the device."""
        # A last dimension of one entry may have any stride, which a view of bytes would refuse.
        data = torch.cat([tensor.unsqueeze(-1).contiguous().view(torch.uint8).flatten() for tensor in tensors.values()])
        return cls(data, tuple((name, tensor.dtype, tensor.shape) for name, tensor in tensors.items()))

    def clone(self) -> Bundle:
        return Bundle(self.data.clone(), self.layout)

    def to_cpu(self) -> dict[str, Tensor]:
        """The tensors, each in memory of its own on the CPU; this waits for their device."""
        parts = self.data.cpu().split([dtype.itemsize * shape.numel() for _, dtype, shape in self.layout])
        return {
            name: part.clone().view(dtype).view(shape)
            for part, (name, dtype, shape) in zip(parts, self.layout, strict=True)
        }
