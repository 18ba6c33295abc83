"""Whether a function can be captured as a CUDA graph, told from its ops while it runs eagerly.

Trying to capture one that cannot would do harm: a failed capture may leave PyTorch's random numbers and allocator as if
it were still going on (pytorch/pytorch issue 171263, pull request 190308).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_COPIES = (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)
_INDEXING = (torch.ops.aten.index.Tensor, torch.ops.aten.index_put.default, torch.ops.aten.index_put_.default)


class ObstacleFinder(TorchDispatchMode):
    """While active in a thread, looks for what the device cannot do without the host.

    Attributes:
        obstacle: the first op that makes the host wait for a value or reaches into another device's memory, and why;
            None if there was none.
    """

    def __init__(self) -> None:
        super().__init__()
        self.obstacle: str | None = None

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Compiled code stays compiled: its guards would refuse another mode, and it would run eagerly for good."""
        return True

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        results = func(*args, **(kwargs or {}))
        if self.obstacle is None:
            found = [leaf for leaf in tree_leaves((args, kwargs, results)) if isinstance(leaf, Tensor)]
            if reason := _reason(func, found):
                self.obstacle = f"{func} {reason}"
        return results


def _reason(func: torch._ops.OpOverload, tensors: list[Tensor]) -> str | None:
    if torch.Tag.data_dependent_output in func.tags:
        return "reads a value"
    if func in _INDEXING:  # the tag says that it could
        if any(t.dtype in (torch.bool, torch.uint8) for t in tensors[1:]):
            return "has as many results as a mask has entries"
    elif torch.Tag.dynamic_output_shape in func.tags:
        return "has a shape that depends on values"
    # A number may come as a tensor on the CPU: it is read when the op is launched.
    places = {t.device for t in tensors if func in _COPIES or t.dim() > 0 or t.device.type != "cpu"}
    return f"touches {' and '.join(sorted(map(str, places)))}" if len(places) > 1 else None
