"""A CLIP of the standard shape in plain PyTorch: open_clip's ``CLIP`` with two ViT towers, to its parameter names.

For where importing open_clip costs more than using it: it brings torchvision, timm and torch's compiler along, which is
more than half of what ``tpt-fast demo`` would take to its first answer. ``load_state_dict`` takes the same weights. The
packed text tower reads it as it reads an open_clip model; the image tower, small as it is, runs by the code here.
Standard means: pre-norm blocks, GELU, class-token pooling, a causal text tower read at its end token.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from functools import lru_cache
from importlib import util
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn


class ResidualAttentionBlock(nn.Module):
    """Attention, then a perceptron four times as wide, each on a LayerNorm of its input and added to it."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True)
        layers = [("c_fc", nn.Linear(width, 4 * width)), ("gelu", nn.GELU()), ("c_proj", nn.Linear(4 * width, width))]
        self.mlp = nn.Sequential(OrderedDict(layers))
        self.ls_1 = self.ls_2 = nn.Identity()

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        normed = self.ln_1(x)
        x = x + self.attn(normed, normed, normed, need_weights=False, attn_mask=mask)[0]
        return x + self.mlp(self.ln_2(x))


class Transformer(nn.Module):
    """Blocks, one after another, over [B, L, width]."""

    def __init__(self, width: int, layers: int, heads: int) -> None:
        super().__init__()
        self.resblocks = nn.ModuleList(ResidualAttentionBlock(width, heads) for _ in range(layers))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        for block in self.resblocks:
            x = block(x, mask)
        return x


class VisionTransformer(nn.Module):
    """[N, 3, S, S] -> [N, embed_dim], not normalised."""

    def __init__(
        self, embed_dim: int, image_size: int, layers: int, width: int, head_width: int, patch_size: int
    ) -> None:
        super().__init__()
        self.image_size = (image_size, image_size)
        self.conv1 = nn.Conv2d(3, width, patch_size, patch_size, bias=False)
        self.class_embedding = nn.Parameter(torch.empty(width))
        self.positional_embedding = nn.Parameter(torch.empty((image_size // patch_size) ** 2 + 1, width))
        self.ln_pre, self.ln_post = nn.LayerNorm(width), nn.LayerNorm(width)
        self.transformer = Transformer(width, layers, width // head_width)
        self.proj = nn.Parameter(torch.empty(width, embed_dim))

    def forward(self, images: Tensor) -> Tensor:
        patches = self.conv1(images).flatten(2).transpose(1, 2)
        x = torch.cat([self.class_embedding.expand(len(patches), 1, -1), patches], dim=1) + self.positional_embedding
        return self.ln_post(self.transformer(self.ln_pre(x))[:, 0]) @ self.proj


class CLIP(nn.Module):
    """From an open_clip model configuration with nothing but ``embed_dim`` and the plain keys of both towers.

    Weights are uninitialised: load a state dict.

    Raises:
        TypeError: the configuration has keys that this class does not know.
    """

    def __init__(self, embed_dim: int, vision_cfg: dict[str, Any], text_cfg: dict[str, Any]) -> None:
        super().__init__()
        self.visual = VisionTransformer(embed_dim, **vision_cfg)
        self._add_text_tower(embed_dim, **text_cfg)
        self.logit_scale = nn.Parameter(torch.empty([]))

    def _add_text_tower(
        self, embed_dim: int, context_length: int, vocab_size: int, width: int, heads: int, layers: int
    ) -> None:
        self.context_length, self.vocab_size = context_length, vocab_size
        self.token_embedding = nn.Embedding(vocab_size, width)
        self.positional_embedding = nn.Parameter(torch.empty(context_length, width))
        self.transformer = Transformer(width, layers, heads)
        self.ln_final = nn.LayerNorm(width)
        self.text_projection = nn.Parameter(torch.empty(width, embed_dim))
        mask = torch.full((context_length, context_length), -torch.inf).triu(1)
        self.register_buffer("attn_mask", mask, persistent=False)

    def encode_image(self, images: Tensor, normalize: bool = False) -> Tensor:
        features = self.visual(images)
        return nn.functional.normalize(features, dim=-1) if normalize else features

    def encode_text(self, ids: Tensor, normalize: bool = False) -> Tensor:
        x = self.token_embedding(ids) + self.positional_embedding
        x = self.ln_final(self.transformer(x, self.attn_mask))
        features = x[torch.arange(len(x), device=x.device), ids.argmax(-1)] @ self.text_projection
        return nn.functional.normalize(features, dim=-1) if normalize else features


@lru_cache(maxsize=1)
def tokenizer() -> Callable[..., Tensor]:
    """open_clip's own ``SimpleTokenizer``, from its file, without importing the rest of open_clip."""
    package = util.find_spec("open_clip")
    if package is None or package.origin is None:
        raise ImportError("open_clip is not installed: pip install open_clip_torch")
    spec = util.spec_from_file_location("tpt_fast._open_clip_tokenizer", Path(package.origin).with_name("tokenizer.py"))
    module = util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.SimpleTokenizer()
