"""How far a call raises the memory in use."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import torch

from .. import _machine


class Peak:
    """The most bytes in use above what was in use at first: of torch on a GPU, else of this process."""

    def __init__(self, device: torch.device) -> None:
        self._device = device if device.type == "cuda" else None
        gc.collect()
        if self._device:
            self._base = torch.cuda.memory_allocated(self._device)
        else:
            _machine.give_back()
            self._base = _machine.resident_bytes()
        self.bytes: int | None = 0  #: the highest peak of all calls; None where the system does not tell

    @property
    def mb(self) -> int | None:
        return None if self.bytes is None else round(self.bytes / 1e6)

    def of(self, run: Callable) -> Any:
        """Call ``run`` and return what it returns."""
        if self._device:
            torch.cuda.reset_peak_memory_stats(self._device)
            result = run()
            self._add(torch.cuda.max_memory_allocated(self._device))
            return result
        try:
            _machine.reset_peak()
        except OSError:  # a container may forbid it
            self.bytes = None
        result = run()
        self._add(_machine.peak_resident_bytes())
        return result

    def _add(self, peak: int) -> None:
        if self.bytes is not None:
            self.bytes = max(self.bytes, peak - self._base)
