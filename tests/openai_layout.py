"""Models laid out as OpenAI's package lays CLIP out (``clip/model.py``), with its names of classes and weights."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional


class LayerNorm(nn.LayerNorm):
    """In float32, which its weights stay in."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.float()).type(x.dtype)


class QuickGELU(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


class ResidualAttentionBlock(nn.Module):
    def __init__(self, width: int, heads: int, attn_mask: Tensor | None) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(width, heads)
        self.ln_1, self.ln_2 = LayerNorm(width), LayerNorm(width)
        self.mlp = nn.Sequential()
        self.mlp.add_module("c_fc", nn.Linear(width, 4 * width))
        self.mlp.add_module("gelu", QuickGELU())
        self.mlp.add_module("c_proj", nn.Linear(4 * width, width))
        self.attn_mask = attn_mask

    def forward(self, x: Tensor) -> Tensor:
        normed = self.ln_1(x)
        mask = None if self.attn_mask is None else self.attn_mask.to(x)
        x = x + self.attn(normed, normed, normed, need_weights=False, attn_mask=mask)[0]
        return x + self.mlp(self.ln_2(x))


class Transformer(nn.Module):
    def __init__(self, width: int, layers: int, heads: int, attn_mask: Tensor | None = None) -> None:
        super().__init__()
        self.resblocks = nn.Sequential(*(ResidualAttentionBlock(width, heads, attn_mask) for _ in range(layers)))

    def forward(self, x: Tensor) -> Tensor:
        return self.resblocks(x)


class VisionTransformer(nn.Module):
    def __init__(self, size: int, patch: int, width: int, layers: int, heads: int, embed: int) -> None:
        super().__init__()
        self.input_resolution = size
        self.conv1 = nn.Conv2d(3, width, patch, patch, bias=False)
        self.class_embedding = nn.Parameter(torch.randn(width))
        self.positional_embedding = nn.Parameter(torch.randn((size // patch) ** 2 + 1, width))
        self.ln_pre, self.ln_post = LayerNorm(width), LayerNorm(width)
        self.transformer = Transformer(width, layers, heads)
        self.proj = nn.Parameter(torch.randn(width, embed))

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.class_embedding.to(x).expand(len(x), 1, -1), x], 1) + self.positional_embedding.to(x)
        x = self.transformer(self.ln_pre(x).transpose(0, 1)).transpose(0, 1)
        return self.ln_post(x[:, 0]) @ self.proj


class Bottleneck(nn.Module):
    def __init__(self, inputs: int, planes: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(inputs, planes, 1, bias=False), nn.BatchNorm2d(planes)
        self.conv2, self.bn2 = nn.Conv2d(planes, planes, 3, padding=1, bias=False), nn.BatchNorm2d(planes)
        self.avgpool = nn.AvgPool2d(stride) if stride > 1 else nn.Identity()
        self.conv3, self.bn3 = nn.Conv2d(planes, 4 * planes, 1, bias=False), nn.BatchNorm2d(4 * planes)
        self.relu, self.downsample = nn.ReLU(inplace=True), None
        if stride > 1 or inputs != 4 * planes:
            self.downsample = nn.Sequential()
            self.downsample.add_module("-1", nn.AvgPool2d(stride))
            self.downsample.add_module("0", nn.Conv2d(inputs, 4 * planes, 1, bias=False))
            self.downsample.add_module("1", nn.BatchNorm2d(4 * planes))

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.avgpool(self.relu(self.bn2(self.conv2(out))))
        out = self.bn3(self.conv3(out))
        return self.relu(out + (x if self.downsample is None else self.downsample(x)))


class AttentionPool2d(nn.Module):
    def __init__(self, side: int, width: int, heads: int, embed: int) -> None:
        super().__init__()
        self.positional_embedding = nn.Parameter(torch.randn(side**2 + 1, width) / width**0.5)
        self.k_proj, self.q_proj = nn.Linear(width, width), nn.Linear(width, width)
        self.v_proj, self.c_proj = nn.Linear(width, width), nn.Linear(width, embed)
        self.num_heads = heads

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(2).permute(2, 0, 1)
        x = torch.cat([x.mean(0, keepdim=True), x]) + self.positional_embedding[:, None].to(x.dtype)
        x, _ = functional.multi_head_attention_forward(
            x[:1], x, x, x.shape[-1], self.num_heads,
            in_proj_weight=None, in_proj_bias=torch.cat([self.q_proj.bias, self.k_proj.bias, self.v_proj.bias]),
            bias_k=None, bias_v=None, add_zero_attn=False, dropout_p=0.0,
            out_proj_weight=self.c_proj.weight, out_proj_bias=self.c_proj.bias,
            training=self.training, need_weights=False, use_separate_proj_weight=True,
            q_proj_weight=self.q_proj.weight, k_proj_weight=self.k_proj.weight, v_proj_weight=self.v_proj.weight,
        )  # fmt: skip
        return x[0]


class ModifiedResNet(nn.Module):
    def __init__(self, layers: tuple[int, ...], embed: int, heads: int, size: int, width: int) -> None:
        super().__init__()
        self.input_resolution = size
        self.conv1, self.bn1 = nn.Conv2d(3, width // 2, 3, 2, 1, bias=False), nn.BatchNorm2d(width // 2)
        self.conv2, self.bn2 = nn.Conv2d(width // 2, width // 2, 3, padding=1, bias=False), nn.BatchNorm2d(width // 2)
        self.conv3, self.bn3 = nn.Conv2d(width // 2, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.avgpool, self.relu = nn.AvgPool2d(2), nn.ReLU(inplace=True)
        inputs = width
        for i, count in enumerate(layers):
            planes = width * 2**i
            blocks = [Bottleneck(inputs if j == 0 else 4 * planes, planes, 2 if i and j == 0 else 1)
                      for j in range(count)]  # fmt: skip
            inputs = 4 * planes
            setattr(self, f"layer{i + 1}", nn.Sequential(*blocks))
        self.attnpool = AttentionPool2d(size // 32, 32 * width, heads, embed)

    def forward(self, x: Tensor) -> Tensor:
        x = x.type(self.conv1.weight.dtype)
        for i in "123":
            x = self.relu(getattr(self, f"bn{i}")(getattr(self, f"conv{i}")(x)))
        x = self.layer4(self.layer3(self.layer2(self.layer1(self.avgpool(x)))))
        return self.attnpool(x)


class CLIP(nn.Module):
    """``patch`` None: with a ResNet."""

    def __init__(
        self,
        size: int = 48,
        patch: int | None = 16,
        width: int = 64,
        layers: int | tuple[int, ...] = 2,
        embed: int = 32,
        text_width: int = 64,
        heads: int = 2,
    ) -> None:
        super().__init__()
        self.context_length, self.vocab_size = 77, 49408
        if isinstance(layers, tuple):
            self.visual: nn.Module = ModifiedResNet(layers, embed, heads, size, width)
        else:
            assert patch is not None
            self.visual = VisionTransformer(size, patch, width, layers, heads, embed)
        mask = torch.full((77, 77), -torch.inf).triu_(1)
        self.transformer = Transformer(text_width, 2, heads, mask)
        self.token_embedding = nn.Embedding(self.vocab_size, text_width)
        self.positional_embedding = nn.Parameter(0.1 * torch.randn(77, text_width))
        self.ln_final = LayerNorm(text_width)
        self.text_projection = nn.Parameter(torch.randn(text_width, embed))
        self.logit_scale = nn.Parameter(torch.tensor(math.log(100.0)))

    @property
    def dtype(self) -> torch.dtype:
        return self.visual.conv1.weight.dtype

    def encode_image(self, image: Tensor) -> Tensor:
        return self.visual(image.type(self.dtype))

    def encode_text(self, text: Tensor) -> Tensor:
        x = self.token_embedding(text).type(self.dtype) + self.positional_embedding.type(self.dtype)
        x = self.transformer(x.transpose(0, 1)).transpose(0, 1)
        x = self.ln_final(x).type(self.dtype)
        return x[torch.arange(len(x)), text.argmax(-1)] @ self.text_projection


def convert_weights(model: nn.Module) -> nn.Module:
    """To fp16, as the package's weights are on a GPU: norms and embeddings stay in float32."""
    for part in model.modules():
        if isinstance(part, (nn.Conv2d, nn.Linear, nn.MultiheadAttention)):
            part.half()
        for name in ("text_projection", "proj"):
            if isinstance(getattr(part, name, None), nn.Parameter):
                getattr(part, name).data = getattr(part, name).data.half()
    return model


def make(kind: type[CLIP] = CLIP, **options) -> CLIP:
    """In evaluation mode, with weights and statistics that make classes and views differ much."""
    torch.manual_seed(0)
    model = kind(**options).eval()
    for name, p in model.named_parameters():
        if p.dim() == 2 and "positional" not in name:
            nn.init.normal_(p, std=0.15)
        elif p.dim() == 4:
            nn.init.normal_(p, std=(2 / p[0].numel()) ** 0.5)
        elif p.dim() == 1 and "class_embedding" not in name:
            p.data += 0.1 * torch.randn_like(p)
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.running_mean.normal_(std=0.3)
            norm.running_var.uniform_(0.5, 2)
    return model


def resnet(kind: type[CLIP] = CLIP) -> CLIP:
    return make(kind, size=64, patch=None, width=16, layers=(2, 1, 1, 1))
