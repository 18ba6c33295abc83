"""Weights of the towers, under names that do not depend on the class of the model that they were read from."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from .matrix import Matrix

#: A module of another library: what is read off it is its own, and the type checker cannot know it.
Foreign: TypeAlias = Any

PRECISIONS = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def storage_type(precision: str | None, module: nn.Module) -> torch.dtype:
    """The storage type for ``precision``, or the type of the module's own matrices for None."""
    if precision is None:
        matrices = [p for p in module.parameters() if p.ndim == 2 and p.is_floating_point()]
        # The token table may stay in float32 in a half-precision model, the matrices of the blocks do not.
        return min((p.dtype for p in matrices), key=lambda dtype: torch.finfo(dtype).bits)
    if precision not in PRECISIONS:
        raise ValueError(f"precision: expected one of {', '.join(PRECISIONS)} or None, got {precision!r}")
    return PRECISIONS[precision]


class Unsupported(Exception):
    """A tower that the packed engines cannot represent exactly; the message is the reason."""


@dataclass(frozen=True)
class Norm:
    """LayerNorm. Weight and bias [W] in the accumulation type."""

    weight: Tensor
    bias: Tensor
    eps: float

    def tensors(self) -> list[Tensor]:
        """What it holds."""
        return [self.weight, self.bias]


@dataclass(frozen=True)
class Linear:
    """y = x @ weight.T + bias. Weight [out, in] in the storage type; bias [out] or None: in the storage type where
    :meth:`project` adds it, in the accumulation type where the op behind the product does."""

    matrix: Matrix
    bias: Tensor | None

    def project(self, x: Tensor) -> Tensor:
        return self.matrix.project(x, self.bias)

    def lay_out(self, *, backward: bool = False) -> Linear:
        """See :meth:`Matrix.lay_out`."""
        return Linear(self.matrix.lay_out(backward=backward), self.bias)

    def tensors(self) -> list[Tensor]:
        """What it holds."""
        return [*self.matrix.tensors(), *([] if self.bias is None else [self.bias])]

    def rows(self, start: int, stop: int) -> Linear:
        """Outputs ``start`` to ``stop`` only."""
        return Linear(self.matrix.rows(start, stop), None if self.bias is None else self.bias[start:stop])


@dataclass(frozen=True)
class Block:
    """One pre-norm residual attention block; a model's LayerScale is folded into ``out`` and ``proj``."""

    norm1: Norm
    qkv: Linear  # [3W, W]: queries, keys, values; adds its own bias, the others leave theirs to the op behind them
    out: Linear
    norm2: Norm
    fc: Linear
    activation: str  # "gelu" (with erf) or "quick_gelu"
    proj: Linear
    heads: int

    def lay_out(self, *, backward: bool = False) -> Block:
        """See :meth:`Matrix.lay_out`."""
        names = ("qkv", "out", "fc", "proj")
        return replace(self, **{name: getattr(self, name).lay_out(backward=backward) for name in names})

    def tensors(self) -> list[Tensor]:
        """What it holds."""
        parts = (self.norm1, self.qkv, self.out, self.norm2, self.fc, self.proj)
        return [tensor for part in parts for tensor in part.tensors()]


@dataclass(frozen=True)
class TextWeights:
    """A causal text tower that is read at its EOT token."""

    table: Tensor  # [vocabulary, W]
    position: Tensor  # [context length, W]
    blocks: tuple[Block, ...]
    norm: Norm
    projection: Linear | None
    dtype: torch.dtype  # storage type of the matrices and of the rows that flow through them

    def lay_out(self) -> TextWeights:
        """Where our own product is faster, with the matrices as it reads them too, and once more for gradients."""
        blocks = tuple(block.lay_out(backward=True) for block in self.blocks)
        projection = None if self.projection is None else self.projection.lay_out(backward=True)
        return replace(self, blocks=blocks, projection=projection)

    def tensors(self) -> list[Tensor]:
        """What it holds."""
        parts: list[Any] = [*self.blocks, self.norm, *([] if self.projection is None else [self.projection])]
        return [self.table, self.position, *(tensor for part in parts for tensor in part.tensors())]

    @property
    def laid_out(self) -> bool:
        return self.blocks[0].qkv.matrix.laid_out


@dataclass(frozen=True)
class ImageWeights:
    """A vision transformer that is read at its class token, of P patches in rows."""

    patch: tuple[int, int]  # height and width in pixels
    embed: Matrix  # [W, 3 * height * width], channels first
    first: Tensor  # [W], the class token at its position
    position: Tensor  # [P, W], with the bias of the patches' embedding if there is one
    norm_pre: Norm | None
    blocks: tuple[Block, ...]
    norm_post: Norm
    projection: Tensor | None  # [W, D]
