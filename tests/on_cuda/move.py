"""CPU tensors to a device and back, so that a test need not know where its op runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only


def there(tensor: Tensor, device: str) -> Tensor:
    """The same bytes on ``device``: strides, offset and what lies around them too."""
    whole = torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage()).to(device, copy=True)
    empty = torch.empty(0, dtype=tensor.dtype, device=device)
    return empty.set_(whole.untyped_storage(), tensor.storage_offset(), tensor.shape, tensor.stride())


def moved(function: Callable, written: tuple[int, ...], device: str = "cuda") -> Callable:
    """``function`` of CPU tensors, computed on ``device``; it writes to its arguments number ``written``."""

    def run(*arguments: Any) -> Any:
        given = tree_map_only(Tensor, lambda t: there(t.detach(), device), arguments)
        results = function(*given)
        for i in written:
            arguments[i].copy_(given[i])
        return tree_map_only(Tensor, Tensor.cpu, results)

    return run
