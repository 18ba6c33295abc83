"""A CLIP's vision transformer, read at its class token: nothing that is never read is computed.

Patches are cut out and projected by one matrix product, biases ride in the ops before or after it, attention reads
queries, keys and values where the one product has put them, and in the last block only the class token is a query and
goes through projection and MLP.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from ..models.weights import Block, ImageWeights, Norm, Unsupported
from ..ops.add_layer_norm import add_layer_norm
from ..reference.views import patches

ROWS_A_THREAD, ROWS_ON_A_GPU = 800, 1 << 15  # of a group of views


class VitTower:
    """A vision transformer's forward pass on ``weights`` in storage type ``dtype``, of images ``size`` pixels high and
    wide."""

    name = "vit"

    def __init__(self, weights: ImageWeights, size: tuple[int, int]) -> None:
        self.patch, self._first, self._position = weights.patch, weights.first, weights.position
        self._grid = size[0] // self.patch[0], size[1] // self.patch[1]
        if self._grid[0] * self._grid[1] != len(self._position):
            raise Unsupported(f"{size[0]} x {size[1]} pixels have no {len(self._position)} patches")
        self._embed, self._norm_pre = weights.embed.lay_out(), weights.norm_pre
        self._blocks = tuple(block.lay_out() for block in weights.blocks)
        if not self._blocks:
            raise Unsupported("the image tower has no blocks")
        width, last = len(self._first), self._blocks[-1].qkv
        self._last_q, self._last_kv = last.rows(0, width), last.rows(width, 3 * width)
        self._norm_post, self._projection = weights.norm_post, weights.projection

    @property
    def laid_out(self) -> bool:
        return self._embed.laid_out

    def tensors(self) -> list[Tensor]:
        """What it holds."""
        norms = [norm for norm in (self._norm_pre, self._norm_post) if norm is not None]
        parts: list[Any] = [self._embed, *self._blocks, self._last_q, self._last_kv, *norms]
        own = [self._first, self._position, *([] if self._projection is None else [self._projection])]
        return own + [tensor for part in parts for tensor in part.tensors()]

    def at_once(self, device: torch.device) -> int:
        """Views of a group: their rows stay near the last cache of a CPU, and bound the memory on a GPU."""
        rows = ROWS_A_THREAD * torch.get_num_threads() if device.type == "cpu" else ROWS_ON_A_GPU
        return max(1, rows // (len(self._position) + 1))

    def encode(self, views: Tensor) -> Tensor:
        """[N, 3, H, W], or [N, patches, 3 * height * width], in the storage type -> [N, D], not normalised."""
        residual, normed = self._before_last(views)
        last = self._blocks[-1]
        (q,) = _split(self._last_q.project(normed[:, :1]), 1, last.heads)
        k, v = _split(self._last_kv.project(normed), 2, last.heads)
        normed = _finish(last, residual[:, :1], scaled_dot_product_attention(q, k, v), self._norm_post)[1]
        return self._project(normed[:, 0])

    def encode_patches(self, views: Tensor, bias: Tensor | None = None) -> Tensor:
        """Features of the patches, [N, P, D], not normalised, of views as for :meth:`encode`.

        Args:
            bias: [P, P], added to the products of the last block's keys with keys, which take the place of queries with
                keys; of that block, only the attention's output is read then. None leaves the block as it is.
        """
        residual, normed = self._before_last(views)
        last = self._blocks[-1]
        if bias is None:
            q, k, v = _split(last.qkv.project(normed), 3, last.heads)
            attended = scaled_dot_product_attention(q, k, v)[:, :, 1:]
            residual = residual[:, 1:].contiguous()
            return self._project(_finish(last, residual, attended, self._norm_post)[1])
        k, v = _split(self._last_kv.project(normed), 2, last.heads)
        to_class = bias.new_zeros(len(bias), 1)  # the class token is a key like others, at no place
        mask = torch.cat([to_class, bias], 1).to(k)
        attended = scaled_dot_product_attention(k[:, :, 1:], k, v, attn_mask=mask)
        branch = last.out.matrix.project(_joined(attended))
        return self._project(_normalise(torch.zeros_like(branch), branch, last.out.bias, self._norm_post)[1])

    def _before_last(self, views: Tensor) -> tuple[Tensor, Tensor]:
        """[N, 1 + P, W] what flows into the last block, and its LayerNorm."""
        residual = self._tokens(views)
        if self._norm_pre is not None:
            residual = _normalise(residual, None, None, self._norm_pre)[1]
        normed = _normalise(residual, None, None, self._blocks[0].norm1)[1]
        for block, following in pairwise(self._blocks):
            q, k, v = _split(block.qkv.project(normed), 3, block.heads)
            residual, normed = _finish(block, residual, scaled_dot_product_attention(q, k, v), following.norm1)
        return residual, normed

    def _project(self, rows: Tensor) -> Tensor:
        return rows if self._projection is None else rows @ self._projection

    def _tokens(self, views: Tensor) -> Tensor:
        """[N, 1 + patches, W]: the class token and the patches, at their positions."""
        if views.dim() == 4:
            (height, width), (rows, columns) = self.patch, self._grid
            views = patches(views[:, :, : rows * height, : columns * width], height, width)
        embedded = self._embed.project(views)
        n, count, width = embedded.shape
        tokens = embedded.new_empty(n, 1 + count, width)
        tokens[:, 0] = self._first
        torch.add(embedded, self._position, out=tokens[:, 1:])
        return tokens


def _split(rows: Tensor, parts: int, heads: int) -> tuple[Tensor, ...]:
    """[N, L, parts * W] -> parts views [N, heads, L, W / heads], where they lie."""
    n, length, width = rows.shape
    return rows.view(n, length, parts, heads, width // (parts * heads)).permute(2, 0, 3, 1, 4).unbind()


def _joined(heads: Tensor) -> Tensor:
    """[N, heads, L, W / heads] -> [N, L, W]."""
    return heads.transpose(1, 2).flatten(2)


def _finish(block: Block, residual: Tensor, attended: Tensor, following: Norm) -> tuple[Tensor, Tensor]:
    """Of a block, what comes behind its attention: what flows out of it, and the LayerNorm that follows."""
    branch = block.out.matrix.project(_joined(attended))
    residual, normed = _normalise(residual, branch, block.out.bias, block.norm2)
    hidden = block.fc.matrix.activate(normed, block.fc.bias, block.activation)
    return _normalise(residual, block.proj.matrix.project(hidden), block.proj.bias, following)


def _normalise(rows: Tensor, branch: Tensor | None, branch_bias: Tensor | None, norm: Norm) -> tuple[Tensor, Tensor]:
    """What flows on, and its LayerNorm."""
    total = add_layer_norm(rows, branch, norm.weight, norm.bias, norm.eps, delta_bias=branch_bias)
    return total.sum, total.normed
