"""The model's own text tower through autograd, on prompts cut to the longest EOT."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..adapters import TextModule, causal_reason, text_root, token_embedding
from ..prompts import Prompts
from .memory import free_bytes


@dataclass(frozen=True)
class _Tape:
    ctx: Tensor  # the leaf of the graphs, or the value to recompute them from
    features: list[Tensor | None]  # of each chunk of classes, with its graph; None is recomputed


class ModuleEngine:
    """Any tower that has token embeddings. Classes go in chunks whose graphs fit in memory together, or one by one."""

    name = "module"

    def __init__(self, model: nn.Module, prompts: Prompts, dtype: torch.dtype, keep: bool) -> None:
        root = text_root(model)
        table = token_embedding(root).weight
        self._accumulate = torch.float64 if dtype == torch.float64 else torch.float32
        causal = causal_reason(root) is None
        self._length = int(prompts.lengths.max()) if causal else prompts.ids.shape[1]
        self._module = TextModule(model, self._length, dtype)
        self._ids = prompts.ids[:, : self._length].to(table.device)
        self._positions = prompts.positions.to(table.device)

        classes = len(prompts.classnames)
        depth = len(getattr(getattr(root, "transformer", None), "resblocks", ())) or 12
        # A block's graph holds about 24 rows of the width a token (norms, q, k, v, MLP with and without activation).
        self._class_bytes = 24 * table.shape[1] * self._length * depth * dtype.itemsize
        budget = free_bytes(table.device) // 3
        self._chunk = max(1, min(classes, 128, budget // self._class_bytes))
        self._keep = keep and classes * self._class_bytes <= budget
        self._classes = classes

    def forward(self, ctx: Tensor, keep: bool) -> tuple[Tensor, _Tape | None]:
        leaf = ctx.detach().clone().requires_grad_(keep)
        features = []
        for begin in range(0, self._classes, self._chunk):
            with torch.set_grad_enabled(keep and self._keep):
                features.append(self._features(leaf, begin))
        result = torch.cat([f.detach() for f in features])
        return result, _Tape(leaf, features if self._keep else [None] * len(features)) if keep else None

    def backward(self, tape: _Tape, grad: Tensor) -> Tensor:
        total = torch.zeros_like(tape.ctx)
        for features, begin in zip(tape.features, range(0, self._classes, self._chunk), strict=True):
            with torch.enable_grad():
                features = self._features(tape.ctx, begin) if features is None else features
            part = grad[begin : begin + self._chunk].to(features.dtype)
            total += torch.autograd.grad(features, tape.ctx, part, retain_graph=True)[0]
        return total

    def describe(self) -> dict:
        tokens = self._classes * self._length
        kept = self._classes * self._class_bytes if self._keep else 0
        return {"tokens": tokens, "chunk": self._chunk, "chunks": -(-self._classes // self._chunk), "kept_bytes": kept}

    def _features(self, ctx: Tensor, begin: int) -> Tensor:
        part = slice(begin, begin + self._chunk)
        ctx = ctx if ctx.ndim == 2 else ctx[part]
        features = self._module(self._ids[part], self._positions[part], ctx)
        return nn.functional.normalize(features.to(self._accumulate), dim=-1)
