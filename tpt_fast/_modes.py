"""The caller's modes, which must not reach into what is computed here."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from functools import wraps
from typing import Any, TypeVar, cast

import torch

#: For tensors that are drawn or counted there: the caller's default device and type are for the caller's own.
ON_THE_CPU: dict[str, Any] = {"device": "cpu", "dtype": torch.float32}

Function = TypeVar("Function", bound=Callable)


def plain_modes(function: Function) -> Function:
    """``function`` outside of inference mode, which would forbid gradients later, and of autocast, which would change
    types."""

    @wraps(function)
    def run(*arguments, **options):
        with ExitStack() as modes:
            modes.enter_context(torch.inference_mode(False))
            for device in ("cpu", "cuda"):
                if torch.is_autocast_enabled(device):
                    modes.enter_context(torch.autocast(device, enabled=False))
            return function(*arguments, **options)

    return cast("Function", run)
