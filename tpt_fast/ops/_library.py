"""One place that defines ops in torch's library ``tpt_fast``.

An op is defined with its PyTorch reference as the implementation for every device. The compiled extension, once loaded,
puts its kernels in front of that for the CPU and CUDA, so an op exists and gives the same answer either way.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

_library = torch.library.Library("tpt_fast", "DEF")


def define(schema: str, reference: Callable, tags: Sequence[torch.Tag] = ()) -> None:
    """Define the op of ``schema``, e.g. ``"scale(Tensor x, float by) -> Tensor"``, with ``reference`` behind it."""
    _library.define(schema, tags=tags)
    _library.impl(schema.partition("(")[0], reference, "CompositeExplicitAutograd")


_library.define("build_info() -> str")


def build_info() -> str:
    """What the compiled extension says of itself; there must be one (``load.ensure().name == "native"``)."""
    return torch.ops.tpt_fast.build_info()
