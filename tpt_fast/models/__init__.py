"""Models as the towers read them: one file a family of models, beside the weights and matrices that it fills.

A model that a tower cannot represent exactly runs through its own code, and says why.
"""

from __future__ import annotations

from typing import Any

import torch

from .family import Family
from .module import unwrapped


def read(model: Any, processor: Any = None) -> Family:
    """The family of ``model`` (which is looked for in wrappers), around it; one that is there already is returned.

    Args:
        processor: of a model of transformers, its processor or image processor, which says how its images are prepared.

    Raises:
        TypeError: a model whose code cannot be read, or a processor for one that has none.
    """
    from .hugging_face import HuggingFace
    from .open_clip import OpenClip
    from .openai import OpenAI

    if isinstance(model, Family):
        return model
    model = unwrapped(model)
    if isinstance(model, torch.jit.ScriptModule):
        raise TypeError(
            f"model: expected a module of Python code, got a TorchScript archive ({type(model).__name__}); load "
            "OpenAI's models by clip.load(..., jit=False)"
        )
    if HuggingFace.owns(model):
        return HuggingFace(model, processor)
    return OpenAI(model) if OpenAI.owns(model) else OpenClip(model)
