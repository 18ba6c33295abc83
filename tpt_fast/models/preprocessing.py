"""What an image tower expects of its images."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import nn

from ..views.crops import INTERPOLATIONS, RESIZE_MODES
from ..views.make import CLIP_MEAN, CLIP_STD
from .weights import Foreign


class Preprocessing(NamedTuple):
    """What the model expects of an image: view 0 follows all of it, the random crops size, mean and deviation."""

    size: int  #: pixels of a side
    mean: tuple[float, float, float] = CLIP_MEAN
    std: tuple[float, float, float] = CLIP_STD
    resize_mode: str = "shortest"  #: "shortest" side to ``size`` and the middle cut out, or "squash" to the square
    interpolation: str = "bicubic"  #: or "bilinear"


def preprocessing(model: Foreign) -> Preprocessing:
    """Read off the image tower: ``image_size`` (or OpenAI's ``input_resolution``), ``image_mean``, ``image_std``, and
    what open_clip's ``preprocess_cfg`` says besides. Mean and deviation are CLIP's where nothing is said.

    Raises:
        TypeError: the model has no image tower, or one in a wrapper.
        ValueError: it does not say the size of its images; they are not square; or they are prepared in a way that is
            not known here: they would be classified from other pixels than the model was trained on.
    """
    visual = getattr(model, "visual", None)
    if not isinstance(visual, nn.Module):
        came = type(model).__name__
        if type(model).__module__.startswith("transformers."):
            instead = "load the same weights by open_clip, as create_model('ViT-B-32-quickgelu', 'openai')"
            came = f"transformers' {came}; {instead}"
        raise TypeError(f"model: expected an open_clip model with an image tower, got {came}")
    if isinstance(visual, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        raise TypeError(f"model: expected its image tower itself, got a {type(visual).__name__}; use visual.module")
    cfg = getattr(visual, "preprocess_cfg", None) or {}
    if not isinstance(cfg, Mapping):
        raise TypeError(f"model: expected visual.preprocess_cfg to be a mapping, got {type(cfg).__name__}")
    mean, std = (
        tuple(getattr(visual, f"image_{name}", None) or cfg.get(name) or default)
        for name, default in (("mean", CLIP_MEAN), ("std", CLIP_STD))
    )
    return Preprocessing(
        _size(visual),
        mean,
        std,
        _known(cfg, "resize_mode", "shortest", RESIZE_MODES),
        _known(cfg, "interpolation", "bicubic", tuple(INTERPOLATIONS)),
    )


def _size(visual: Foreign) -> int:
    size = getattr(visual, "image_size", getattr(visual, "input_resolution", None))
    if size is None:
        raise ValueError(
            "model: expected its image tower to say the size of its images (visual.image_size), "
            f"{type(visual).__name__} does not"
        )
    height, width = size if isinstance(size, (tuple, list)) else (size, size)
    if height != width:
        raise ValueError(f"model: expected square images, got an image tower for {height} x {width}")
    return int(height)


def _known(cfg: Mapping[str, Any], name: str, default: str, known: tuple[str, ...]) -> str:
    value = cfg.get(name) or default
    if value not in known:
        raise ValueError(f"model: visual.preprocess_cfg says {name} {value!r}, and {' or '.join(known)} are known here")
    return value
