"""The model's own text tower through autograd, on prompts cut behind the last token that matters."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .._machine import free_bytes
from ..memory import graph_tensors
from ..models.family import Family
from ..models.module import UnderAutocast
from ..ops._types import accumulation_dtype
from .half import into_range
from .prompts import Prompts


class ModuleTower:
    """Any tower that has token embeddings, its weights converted once; the caller's model stays as it is.

    Args:
        autocast: run it under fp16 autocast, as the published code does.
    """

    def __init__(self, family: Family, dtype: torch.dtype, autocast: bool = False) -> None:
        self._family, self._dtype, self._autocast = family.for_text(dtype), dtype, autocast

    def bind(self, prompts: Prompts, keep: bool) -> ModuleText:
        """The tower with one class list; see :meth:`tpt_fast.text.tower.TextTower.bind`."""
        return ModuleText(self._family, prompts, self._dtype, keep, self._autocast)


@dataclass(frozen=True)
class _Tape:
    ctx: Tensor  # the leaf of the graphs, or the value to recompute them from
    features: list[Tensor | None]  # of each chunk of classes, with its graph; None is recomputed


class ModuleText:
    """One class list on a :class:`ModuleTower`. Classes go in chunks whose graphs fit in memory together, or one by
    one."""

    name, laid_out = "module", False

    def __init__(self, family: Family, prompts: Prompts, dtype: torch.dtype, keep: bool, autocast: bool) -> None:
        table = family.embedding.weight
        self._dtype, self._accumulate = dtype, accumulation_dtype(dtype)
        lengths = family.read_lengths(prompts.ids)
        self._length = prompts.ids.shape[1]
        if lengths is not None:
            self._length = int(torch.maximum(lengths, prompts.ends).max())
        self._module = _PromptModule(family, self._length, dtype)
        self._run = UnderAutocast(self._module) if autocast else self._module
        self._ids = prompts.ids[:, : self._length].to(table.device)
        self._positions = prompts.positions.to(table.device)

        classes = len(prompts.classnames)
        # A block's graph holds about 24 rows of the width a token (norms, q, k, v, MLP with and without activation).
        self._class_bytes = 24 * table.shape[1] * self._length * family.depth * dtype.itemsize
        budget = free_bytes(table.device) // 3
        self._chunk = max(1, min(classes, 128, budget // self._class_bytes))
        self._keep = keep and classes * self._class_bytes <= budget
        self._classes = classes

    def forward(self, ctx: Tensor, keep: bool) -> tuple[Tensor, _Tape | None]:
        leaf = ctx.detach().clone().requires_grad_(keep)
        features: list[Tensor] = []
        for begin in range(0, self._classes, self._chunk):
            with torch.set_grad_enabled(keep and self._keep):
                features.append(self._features(leaf, begin))
        result = torch.cat([f.detach() for f in features])
        return result, _Tape(leaf, [*features] if self._keep else [None] * len(features)) if keep else None

    def backward(self, tape: _Tape, grad: Tensor) -> Tensor:
        total = torch.zeros_like(tape.ctx)
        scale = into_range(grad, self._dtype)
        for features, begin in zip(tape.features, range(0, self._classes, self._chunk), strict=True):
            with torch.enable_grad():
                features = self._features(tape.ctx, begin) if features is None else features
            part = grad[begin : begin + self._chunk].to(features.dtype) * scale
            total += torch.autograd.grad(features, tape.ctx, part, retain_graph=True)[0]
        return total / scale

    def describe(self) -> dict:
        tokens = self._classes * self._length
        kept = self._classes * self._class_bytes if self._keep else 0
        return {"tokens": tokens, "chunk": self._chunk, "chunks": -(-self._classes // self._chunk), "kept_bytes": kept}

    def weights(self) -> list[Tensor]:
        """What the tower holds."""
        return [*self._module.parameters(), *self._module.buffers(), *self._module.cut()]

    def tensors(self) -> list[Tensor]:
        """What it holds for its class list, beside the tower."""
        return [self._ids, self._positions]

    @staticmethod
    def tape_tensors(tape: _Tape) -> list[Tensor]:
        """What ``tape`` keeps."""
        return [tape.ctx, *graph_tensors([features for features in tape.features if features is not None])]

    def _features(self, ctx: Tensor, begin: int) -> Tensor:
        part = slice(begin, begin + self._chunk)
        ctx = ctx if ctx.ndim == 2 else ctx[part]
        features = self._run(self._ids[part], self._positions[part], ctx)
        return nn.functional.normalize(features.to(self._accumulate), dim=-1)


class _PromptModule(nn.Module):
    """The model's own text tower, run on token embeddings that we choose.

    Causal towers are cut to ``length`` positions, which is exact: nothing behind the token that they read can reach it.
    """

    def __init__(self, family: Family, length: int, dtype: torch.dtype) -> None:
        super().__init__()
        family = family.for_text(dtype)  # around the same weights
        if family.not_causal() is None:
            family.cut(length)
        self._embedding = _PromptEmbedding(family.embedding)
        family.replace_embedding(self._embedding)
        self._family, self._tower = family, family.model

    def cut(self) -> list[Tensor]:
        """Tensors of the tower that are neither parameters nor buffers."""
        mask = getattr(self._tower, "attn_mask", None)
        return [mask] if isinstance(mask, Tensor) else []

    def forward(self, ids: Tensor, positions: Tensor, ctx: Tensor) -> Tensor:
        """Features [C, D], not normalised, differentiable in ``ctx``.

        Args:
            ids: int64 [C, L] token ids; those at ``positions`` only mark their places.
            positions: int64 [C, n_ctx], where each context vector stands.
            ctx: [n_ctx, W] or [C, n_ctx, W].
        """
        return self._embedding.run_with(positions, ctx, lambda: self._family.encode_text(ids))


class _PromptEmbedding(nn.Module):
    """Token embedding with context vectors in given places; each thread has its own."""

    def __init__(self, embedding: nn.Embedding) -> None:
        super().__init__()
        self._embedding, self.weight = embedding, embedding.weight
        self._place = threading.local()

    def run_with(self, positions: Tensor, ctx: Tensor, run: Callable[[], Tensor]) -> Tensor:
        self._place.value = positions, ctx
        try:
            return run()
        finally:
            del self._place.value

    def forward(self, ids: Tensor) -> Tensor:
        positions, ctx = self._place.value
        rows = torch.arange(len(ids), device=ids.device)[:, None].expand_as(positions)
        embedded = self._embedding(ids)  # which may scale them, as NLLB's does
        return embedded.index_put((rows, positions), ctx.to(embedded.dtype).expand(len(ids), -1, -1))
