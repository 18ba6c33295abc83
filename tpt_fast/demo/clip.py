"""A CLIP with a ResNet in plain PyTorch: open_clip's ``CLIP`` with a ``ModifiedResNet``, to its parameter names.

For where importing open_clip costs more than using it: it brings torchvision, timm and torch's compiler along, which is
more than half of what ``tpt-fast demo`` would take to its first answer. ``load_state_dict`` takes the same weights, and
both towers are read as those of an open_clip model are. The text tower is the standard one: pre-norm blocks, GELU,
causal attention, read at its end token.
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


class Bottleneck(nn.Module):
    """Three convolutions beside a shortcut; pooled by ``stride`` before the last one, and before the shortcut's."""

    def __init__(self, inputs: int, planes: int, stride: int) -> None:
        super().__init__()
        outputs = 4 * planes
        self.conv1, self.bn1 = nn.Conv2d(inputs, planes, 1, bias=False), nn.BatchNorm2d(planes)
        self.act1 = nn.ReLU(inplace=True)
        self.conv2, self.bn2 = nn.Conv2d(planes, planes, 3, padding=1, bias=False), nn.BatchNorm2d(planes)
        self.act2 = nn.ReLU(inplace=True)
        self.avgpool = nn.AvgPool2d(stride) if stride > 1 else nn.Identity()
        self.conv3, self.bn3 = nn.Conv2d(planes, outputs, 1, bias=False), nn.BatchNorm2d(outputs)
        self.act3 = nn.ReLU(inplace=True)
        self.downsample = None
        if stride > 1 or inputs != outputs:
            conv, norm = nn.Conv2d(inputs, outputs, 1, bias=False), nn.BatchNorm2d(outputs)
            self.downsample = nn.Sequential(OrderedDict([("-1", nn.AvgPool2d(stride)), ("0", conv), ("1", norm)]))

    def forward(self, x: Tensor) -> Tensor:
        out = self.act1(self.bn1(self.conv1(x)))
        out = self.avgpool(self.act2(self.bn2(self.conv2(out))))
        out = self.bn3(self.conv3(out))
        return self.act3(out + (x if self.downsample is None else self.downsample(x)))


class AttentionPool2d(nn.Module):
    """[N, width, H, W] -> [N, embed_dim]: attention over the pixels and their mean, read at the mean."""

    def __init__(self, side: int, width: int, num_heads: int, embed_dim: int) -> None:
        super().__init__()
        self.positional_embedding = nn.Parameter(torch.empty(side**2 + 1, width))
        self.k_proj, self.q_proj, self.v_proj = (nn.Linear(width, width) for _ in range(3))
        self.c_proj = nn.Linear(width, embed_dim)
        self.num_heads = num_heads

    def forward(self, x: Tensor) -> Tensor:
        rows = x.flatten(2).transpose(1, 2)
        rows = torch.cat([rows.mean(1, keepdim=True), rows], 1) + self.positional_embedding
        query, key, value = (
            projection(of).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for projection, of in ((self.q_proj, rows[:, :1]), (self.k_proj, rows), (self.v_proj, rows))
        )
        pooled = nn.functional.scaled_dot_product_attention(query, key, value)
        return self.c_proj(pooled.transpose(1, 2).flatten(1))


class ModifiedResNet(nn.Module):
    """CLIP's ResNet, [N, 3, S, S] -> [N, embed_dim], not normalised."""

    def __init__(self, embed_dim: int, image_size: int, layers: list[int], width: int, head_width: int = 64) -> None:
        super().__init__()
        self.image_size, half = image_size, width // 2
        self.conv1, self.bn1 = nn.Conv2d(3, half, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(half)
        self.act1 = nn.ReLU(inplace=True)
        self.conv2, self.bn2 = nn.Conv2d(half, half, 3, padding=1, bias=False), nn.BatchNorm2d(half)
        self.act2 = nn.ReLU(inplace=True)
        self.conv3, self.bn3 = nn.Conv2d(half, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.act3 = nn.ReLU(inplace=True)
        self.avgpool = nn.AvgPool2d(2)
        inputs = width
        for i, blocks in enumerate(layers):
            planes = width * 2**i
            rest = (Bottleneck(4 * planes, planes, 1) for _ in range(blocks - 1))
            self.add_module(f"layer{i + 1}", nn.Sequential(Bottleneck(inputs, planes, 2 if i else 1), *rest))
            inputs = 4 * planes
        self.attnpool = AttentionPool2d(image_size // 32, inputs, inputs // head_width, embed_dim)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act1(self.bn1(self.conv1(x)))
        x = self.act2(self.bn2(self.conv2(x)))
        x = self.avgpool(self.act3(self.bn3(self.conv3(x))))
        for name in ("layer1", "layer2", "layer3", "layer4"):
            x = self.get_submodule(name)(x)
        return self.attnpool(x)


class CLIP(nn.Module):
    """From an open_clip model configuration with nothing but ``embed_dim`` and the plain keys of both towers.

    Weights are uninitialised: load a state dict.

    Raises:
        TypeError: the configuration has keys that this class does not know.
    """

    def __init__(self, embed_dim: int, vision_cfg: dict[str, Any], text_cfg: dict[str, Any]) -> None:
        super().__init__()
        self.visual = ModifiedResNet(embed_dim, **vision_cfg)
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
    if spec is None or spec.loader is None:
        raise ImportError(f"open_clip's tokenizer cannot be read beside {package.origin}")
    module = util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.SimpleTokenizer()
