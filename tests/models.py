"""Small CLIPs with seeded random weights, for all tests that do not ask for a certain one."""

from __future__ import annotations

from typing import Any

import open_clip
import torch
from torch import nn

VISION = {"image_size": 32, "layers": 2, "width": 64, "patch_size": 8, "head_width": 32}
RESNET = {"image_size": 64, "layers": (1, 1, 1, 1), "width": 32, "patch_size": None, "head_width": 64}
TRANSFORMERS_TEXT = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
TRANSFORMERS_VISION = TRANSFORMERS_TEXT | {"image_size": 48, "patch_size": 16}
TEXT = {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 2}


def clip(
    kind: str = "CLIP",
    seed: int = 1,
    embed: int = 32,
    std: float | None = None,
    vision: dict[str, Any] | None = None,
    text: dict[str, Any] | None = None,
    **options: Any,
) -> nn.Module:
    """A model in evaluation mode; with ``std``, matrices are drawn that wide, so that classes and views differ more.

    ``vision`` and ``text`` change what VISION and TEXT say."""
    torch.manual_seed(seed)
    model = getattr(open_clip.model, kind)(embed, {**VISION, **(vision or {})}, {**TEXT, **(text or {})}, **options)
    for p in model.parameters():
        if std is not None and p.dim() > 1:
            nn.init.normal_(p, std=std)
    return model.eval()


def of_transformers(
    text: dict[str, Any] | None = None, vision: dict[str, Any] | None = None, kind: str = "CLIP", **options: Any
) -> nn.Module:
    """transformers' model of that kind in evaluation mode; its classes and views differ much."""
    import transformers

    torch.manual_seed(0)
    parts = {"text_config": TRANSFORMERS_TEXT | (text or {}), "vision_config": TRANSFORMERS_VISION | (vision or {})}
    model = getattr(transformers, f"{kind}Model")(getattr(transformers, f"{kind}Config")(**parts, **options)).eval()
    for p in model.parameters():
        if p.dim() == 2:
            nn.init.normal_(p, std=0.2)
        elif p.dim() == 1 and p.numel() > 1:
            p.data += 0.1 * torch.randn_like(p)
    return model


def images(size: int = 48, **options: Any) -> Any:
    """The processor of CLIP's images, by Pillow."""
    from transformers import CLIPImageProcessorPil

    return CLIPImageProcessorPil(size={"shortest_edge": size}, crop_size={"height": size, "width": size}, **options)


def transformers_tokenizer() -> Any:
    """CLIP's, as transformers has it."""
    from open_clip.tokenizer import SimpleTokenizer
    from transformers import CLIPTokenizer

    own = SimpleTokenizer()
    names = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
    merges = sorted(own.bpe_ranks, key=own.bpe_ranks.__getitem__)
    return CLIPTokenizer(vocab={names.get(name, name): i for name, i in own.encoder.items()}, merges=merges)
