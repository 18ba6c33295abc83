"""Small CLIPs with seeded random weights, for all tests that do not ask for a certain one."""

from __future__ import annotations

from typing import Any

import open_clip
import torch
from torch import nn

VISION = {"image_size": 32, "layers": 2, "width": 64, "patch_size": 8, "head_width": 32}
RESNET = {"image_size": 64, "layers": (1, 1, 1, 1), "width": 32, "patch_size": None, "head_width": 64}
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
