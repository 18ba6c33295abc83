"""Starting weights that already look a little like those of a trained vision transformer.

Patches go through a whitening of the training set's patches, positions are sines and cosines, attention starts as in
A. Trockman and J. Z. Kolter, "Mimetic Initialization of Self-Attention Layers", ICML 2023.
"""

from __future__ import annotations

import torch
from open_clip.model import CLIP
from open_clip.pos_embed import get_2d_sincos_pos_embed
from torch import Tensor, nn


@torch.no_grad()
def initialise(model: CLIP, images: Tensor) -> None:
    """Set the weights of ``model`` in place, drawing from the global generator.

    images: float32 [B, 3, H, W], normalised like the model's input; a few thousand are enough.
    """
    visual = model.visual
    width = visual.class_embedding.numel()
    _whiten(visual.conv1, images)
    grid = torch.from_numpy(get_2d_sincos_pos_embed(width, visual.grid_size[0], cls_token=True))
    visual.positional_embedding.copy_(grid)
    for tower in (visual.transformer, model.transformer):
        for block in tower.resblocks:
            _mimetic(block.attn)
            nn.init.normal_(block.mlp.c_fc.weight, std=width**-0.5)
            nn.init.normal_(block.mlp.c_proj.weight, std=(2 * width * tower.layers) ** -0.5 / 2)
            nn.init.zeros_(block.mlp.c_fc.bias)
            nn.init.zeros_(block.mlp.c_proj.bias)


def _whiten(conv: nn.Conv2d, images: Tensor) -> None:
    """Filters = random orthonormal mixtures of whitening directions: unit variance, no correlation in each half."""
    patch = conv.kernel_size[0]
    patches = images.unfold(2, patch, patch).unfold(3, patch, patch).permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(0, 2)
    values, vectors = torch.linalg.eigh(torch.cov(patches.T))
    # Without a floor the finest details, mostly noise, would be as loud as the shapes.
    whitening = vectors / (values + 0.02 * values.mean()).sqrt()
    out = conv.out_channels
    mixture = torch.nn.init.orthogonal_(torch.empty(out, len(values))) * (out / len(values)) ** 0.5
    conv.weight.copy_((mixture @ whitening.T).view_as(conv.weight))


def _mimetic(attn: nn.MultiheadAttention, alpha: float = 0.4, beta: float = 0.4, qk: float = 0.7) -> None:
    """Wq Wk^T = qk (noise + I) for each head, and Wv Wo = alpha noise - beta I."""
    width, heads = attn.embed_dim, attn.num_heads
    depth = width // heads
    query, key, value = attn.in_proj_weight.split(width)
    eye = torch.eye(width)
    for h in range(heads):
        u, s, v = torch.linalg.svd(qk * torch.randn(width, width) / width**0.5 + qk * eye)
        rows, root = slice(h * depth, (h + 1) * depth), s[:depth].sqrt()
        query[rows] = (u[:, :depth] * root).T
        key[rows] = root[:, None] * v[:depth]
    u, s, v = torch.linalg.svd(alpha * torch.randn(width, width) / width**0.5 - beta * eye)
    value.copy_((u * s.sqrt()).T)
    attn.out_proj.weight.copy_((s.sqrt()[:, None] * v).T)
    nn.init.zeros_(attn.in_proj_bias)
    nn.init.zeros_(attn.out_proj.bias)
