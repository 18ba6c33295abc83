"""CLIP's ResNets: batch norms folded into convolutions, channels last, and of the attention pooling the query that is
read.

Measured on an AVX2 AMD CPU with RN50 and 32 views, taking turns: 1.9 times faster than open_clip's ``encode_image``.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from ..models.module import replica
from ..models.weights import Foreign, Unsupported
from ..ops._types import accumulation_dtype

VIEWS_ON_A_CPU, VIEWS_ON_A_GPU = 8, 64  # of a group


class ResNetTower:
    """CLIP's ``ModifiedResNet``, of any library, by its own code on folded weights.

    Raises:
        Unsupported: the tower is another.
    """

    name = "resnet"

    def __init__(self, visual: Foreign, dtype: torch.dtype) -> None:
        pool = getattr(visual, "attnpool", None)
        for part, kind in ((visual, "ModifiedResNet"), (pool, "AttentionPool2d")):
            if type(part).__name__ != kind:
                raise Unsupported(f"the image tower has a {type(part).__name__}, not CLIP's {kind}")
        visual = replica(visual, accumulation_dtype(dtype))
        _fold(visual)
        visual.attnpool = PooledQuery(visual.attnpool)
        self._visual = visual.to(dtype, memory_format=torch.channels_last)

    def tensors(self) -> list[Tensor]:
        """What it holds."""
        return [*self._visual.parameters(), *self._visual.buffers()]

    def at_once(self, device: torch.device) -> int:
        """Views of a group, which costs a CPU no time and bounds the memory."""
        return VIEWS_ON_A_CPU if device.type == "cpu" else VIEWS_ON_A_GPU

    def encode(self, views: Tensor) -> Tensor:
        """[N, 3, H, W] -> [N, D], not normalised."""
        return self._visual(views)


def _fold(visual: Foreign) -> None:
    """A batch norm in evaluation mode scales and shifts channels, which its convolution can do as well.

    In this tower every batch norm is registered, and called, right after its convolution.
    """
    for parent in list(visual.modules()):
        for (conv_name, conv), (norm_name, norm) in pairwise(list(parent.named_children())):
            if isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
                setattr(parent, conv_name, fuse_conv_bn_eval(conv, norm))
                setattr(parent, norm_name, nn.Identity())


class PooledQuery(nn.Module):
    """CLIP's attention pooling over the pixels and their mean, for the query of the mean, all that it returns.

    With one query a head h, ``q_h . (K_h x + k_h)`` is ``(K_h^T q_h) . x`` plus a constant that the softmax does not
    see, and ``sum_x p (V_h x + v_h)`` is ``V_h (sum_x p x) + v_h``: no row is ever projected to a key or a value.
    """

    def __init__(self, pool: Foreign) -> None:
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
