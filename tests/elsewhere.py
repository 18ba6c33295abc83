"""The ops' own tests on other kernels: what the plugins that put such kernels in the ops' place have in common."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

STEMS = ("adamw_step", "add_layer_norm", "augmix", "bias_act", "objective", "prefix_attention", "views")


def install(kernels: dict[str, Callable]) -> None:
    """Put ``kernels``, by op, in front of what ``torch.ops.tpt_fast`` does with CPU tensors, for good."""
    install.library = torch.library.Library("tpt_fast", "IMPL", "CPU")  # its ops live as long as it does
    for name, kernel in kernels.items():
        install.library.impl(name, kernel)


def add_option(parser: pytest.Parser) -> None:
    parser.addoption("--short", action="store_true", help="without what takes long under a sanitizer")


def leave_out(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Of the ops' own tests, keep those that say something of the kernels."""
    markers = ("host", "long") if config.getoption("--short") else ("host",)
    out = [item for item in items if any(item.get_closest_marker(name) for name in markers)]
    config.hook.pytest_deselected(items=out)
    items[:] = [item for item in items if item not in out]
