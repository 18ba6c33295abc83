"""Prompts -> packed rows: one shared prefix, then each class's own suffix, without padding."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .prompts import Prompts


@dataclass(frozen=True)
class Layout:
    """R packed rows of C classes. Rows 0..prefix-1 are SOS and the context before the names."""

    classes: slice  # which classes these are
    prefix: int
    offsets: Tensor  # int64 [C + 1], first row of each suffix
    last: Tensor  # int64 [C], the EOT rows
    ids: Tensor  # int64 [R], token of each row; of context rows it is not read
    position: Tensor  # int64 [R], place of each row in its prompt
    shared: slice  # rows in the prefix that hold context vectors 0..lead-1
    own: Tensor  # int64 [C, n_ctx - lead], rows in the suffixes that hold the other vectors
    touched: Tensor  # int64, all rows that hold context vectors

    @property
    def rows(self) -> int:
        return len(self.ids)

    def tensors(self) -> list[Tensor]:
        return [value for value in vars(self).values() if isinstance(value, Tensor)]

    def to(self, device: torch.device) -> Layout:
        moved: dict[str, Any] = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in vars(self).items()}
        return Layout(**moved)


def pack(prompts: Prompts, class_specific: bool, rows_at_once: int, device: torch.device) -> list[Layout]:
    """Layouts of consecutive classes, each of about ``rows_at_once`` rows or fewer, and of one class at least.

    Every layout has the prefix of its own: a few rows more, and no state passes between them.
    """
    first = prompts.first
    lead = 0 if class_specific else prompts.lead
    prefix = first + lead
    lengths = prompts.lengths - prefix
    return [
        _pack(prompts, part, lengths[part], prefix, slice(first, prefix)).to(device)
        for part in _split(lengths.tolist(), max(1, rows_at_once - prefix))
    ]


def _split(lengths: list[int], rows_at_once: int) -> Iterator[slice]:
    """Consecutive runs of classes, evenly filled."""
    target = sum(lengths) / max(1, -(-sum(lengths) // rows_at_once))
    begin, filled = 0, 0
    for c, length in enumerate(lengths):
        if c > begin and filled + length / 2 > target:
            yield slice(begin, c)
            begin, filled = c, 0
        filled += length
    yield slice(begin, len(lengths))


def _pack(prompts: Prompts, part: slice, lengths: Tensor, prefix: int, shared: slice) -> Layout:
    offsets = prefix + torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
    rows = int(offsets[-1])
    row_class = torch.repeat_interleave(lengths)
    position = torch.arange(prefix, rows, device="cpu") - offsets[row_class] + prefix
    ids = prompts.ids[part]
    own = prompts.positions[part, shared.stop - shared.start :] - prefix + offsets[:-1, None]
    return Layout(
        classes=part,
        prefix=prefix,
        offsets=offsets,
        last=offsets[1:] - 1,
        ids=torch.cat([ids[0, :prefix], ids[row_class, position]]),
        position=torch.cat([torch.arange(prefix, device="cpu"), position]),
        shared=shared,
        own=own,
        touched=torch.cat([torch.arange(shared.start, shared.stop, device="cpu"), own.flatten()]),
    )
