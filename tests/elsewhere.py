"""The ops' own tests on other kernels: what the plugins that put such kernels in the ops' place have in common."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

STEMS = ("adamw_step", "add_layer_norm", "bias_act", "objective", "prefix_attention", "views")

# Tests of what comes before a kernel or after it, which another kernel cannot change.
_UNCHANGED = (
    "opcheck", "messages", "of_another_kind", "test_boxes_", "draw_boxes", "gradcheck", "normalised_bits", "threads",
    "pil_modes",
)  # fmt: skip
# Repetitions that take long where a kernel is slow: under a sanitizer.
_LONG = (
    "slivers", "megapixels", "any_size", "any_number", "gradient_equals", "extremes", "absolute_error", "golden",
)  # fmt: skip
# Bounds that only the CPU's bindings check: a device cannot look at a tensor without waiting.
_UNCHECKED = ("the_kernel_refuses_an_index_that_is_no_view", "test_specs", "offsets_are_checked")


def install(kernels: dict[str, Callable]) -> None:
    """Put ``kernels``, by op, in front of what ``torch.ops.tpt_fast`` does with CPU tensors, for good."""
    install.library = torch.library.Library("tpt_fast", "IMPL", "CPU")  # its ops live as long as it does
    for name, kernel in kernels.items():
        install.library.impl(name, kernel)


def add_option(parser: pytest.Parser) -> None:
    parser.addoption("--short", action="store_true", help="without what takes long under a sanitizer")


def leave_out(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Of the ops' own tests, keep those that say something of the kernels."""
    names = _UNCHANGED + _UNCHECKED + (_LONG if config.getoption("--short") else ())
    out = [item for item in items if any(name in item.name for name in names)]
    config.hook.pytest_deselected(items=out)
    items[:] = [item for item in items if item not in out]
