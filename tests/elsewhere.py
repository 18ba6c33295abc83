"""The ops' own tests on other kernels: what the plugins that put such kernels in the ops' place have in common."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from types import SimpleNamespace

import pytest
import torch

STEMS = ("adamw_step", "add_layer_norm", "bias_act", "objective", "prefix_attention", "views")

# Tests of what comes before a kernel or after it, which another kernel cannot change, for ``pytest -k``.
UNCHANGED = "opcheck or messages or of_another_kind or boxes_ or gradcheck or normalised_bits or threads or pil_modes"
# Repetitions that take long where a kernel is slow: on the CPU, or under a sanitizer.
LONG = "slivers or megapixels or any_size or any_number or gradient_equals or extremes or absolute_error or golden"

# Bounds that only the CPU's bindings check: a device cannot look at a tensor without waiting.
_UNCHECKED = ("test_the_kernel_refuses_an_index_that_is_no_view", "test_specs")


def install(kernels: dict[str, Callable]) -> None:
    """Put ``kernels``, by op, in front of what ``torch.ops.tpt_fast`` does with CPU tensors, for good."""
    install.library = torch.library.Library("tpt_fast", "IMPL", "CPU")  # its ops live as long as it does
    for name, kernel in kernels.items():
        module = import_module(f"tpt_fast.ops.{name.removesuffix('_backward')}")
        install.library.impl(name, kernel)
        if hasattr(module, "_HALF"):  # there is no CPU kernel for half types, so the op calls its reference itself
            module.reference = SimpleNamespace(**kernels)


def skip_unchecked(items: list[pytest.Item]) -> None:
    for item in items:
        if item.name.startswith(_UNCHECKED):
            item.add_marker(pytest.mark.skip("the device does not look at indices"))
