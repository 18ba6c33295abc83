"""The model's own image tower; of a ResNet's attention pooling only the query that is read."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn


def replica(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Second module objects around the same weights (converted once where ``dtype`` differs), in evaluation mode and
    without gradients, so that the caller's model keeps its mode, its dtype and its requires_grad."""
    memo: dict[int, object] = {}
    for p in module.parameters():
        memo[id(p)] = nn.Parameter(p.detach().to(dtype), requires_grad=False)
    for b in module.buffers():
        memo[id(b)] = b.detach().to(dtype) if b.is_floating_point() else b.detach()
    return copy.deepcopy(module, memo).eval()


class ModuleTower:
    """Any image tower, by its own code."""

    def __init__(self, visual: nn.Module, dtype: torch.dtype) -> None:
        self._visual = replica(visual, dtype)
        pool = getattr(self._visual, "attnpool", None)
        if type(self._visual).__name__ == "ModifiedResNet" and type(pool).__name__ == "AttentionPool2d":
            self._visual.attnpool = PooledQuery(pool)

    def encode(self, views: Tensor) -> Tensor:
        """[N, 3, S, S] -> [N, D], not normalised."""
        features = self._visual(views)
        return features[0] if isinstance(features, tuple) else features


class PooledQuery(nn.Module):
    """CLIP's attention pooling over the pixels and their mean, for the query of the mean, all that it returns.

    With one query a head h, ``q_h . (K_h x + k_h)`` is ``(K_h^T q_h) . x`` plus a constant that the softmax does not
    see, and ``sum_x p (V_h x + v_h)`` is ``V_h (sum_x p x) + v_h``: no row is ever projected to a key or a value.
    """

    def __init__(self, pool: nn.Module) -> None:
        super().__init__()
        self.position, self.heads = pool.positional_embedding, pool.num_heads
        self.query, self.key, self.value, self.out = pool.q_proj, pool.k_proj, pool.v_proj, pool.c_proj

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] -> [N, D]."""
        rows = x.flatten(2).transpose(1, 2)
        rows = torch.cat([rows.mean(1, keepdim=True), rows], 1) + self.position.to(x.dtype)
        n, _, width = rows.shape
        per_head = (self.heads, width // self.heads)
        query = self.query(rows[:, 0]) * per_head[1] ** -0.5
        query = torch.einsum("nhd,hdc->nhc", query.view(n, *per_head), self.key.weight.view(*per_head, width))
        chances = (query @ rows.transpose(1, 2)).softmax(-1)
        value = torch.einsum("nhc,hdc->nhd", chances @ rows, self.value.weight.view(*per_head, width)).reshape(n, width)
        return self.out(value + self.value.bias)
