"""Models as the towers read them: one file a family of models, beside the weights and matrices that it fills.

A model that a tower cannot represent exactly runs through its own code, and says why.
"""

from __future__ import annotations

from typing import Any

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

    if isinstance(model, Family):
        return model
    model = unwrapped(model)
    if HuggingFace.owns(model):
        return HuggingFace(model, processor)
    return OpenClip(model)
