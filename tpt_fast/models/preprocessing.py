"""What an image tower expects of its images."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import nn

from .._checks import check_size
from ..views.crops import INTERPOLATIONS
from ..views.make import CLIP_MEAN, CLIP_STD, RESIZE_MODES
from .weights import Foreign


class Preprocessing(NamedTuple):
    """What the model expects of an image: view 0 follows all of it, the random crops size, mean and deviation."""

    size: int | tuple[int, int]  #: pixels of a side, or (height, width) of an image that is no square
    mean: tuple[float, float, float] = CLIP_MEAN
    std: tuple[float, float, float] = CLIP_STD
    #: "shortest": resized until it just covers the size, and cut; "squash"; "longest": fitted in, in a margin
    resize_mode: str = "shortest"
    interpolation: str = "bicubic"  #: or "bilinear"
    crop: str = "round"  #: torchvision's; or "floor", where transformers' middle begins that begins between two pixels
    fill: int = 0  #: byte of the margin

    @property
    def sides(self) -> tuple[int, int]:
        """(height, width) of an image."""
        return check_size("size", self.size)


def of_open_clip(model: Foreign) -> Preprocessing:
    """Read off the image tower: ``image_size`` (or OpenAI's ``input_resolution``), ``image_mean``, ``image_std``, and
    what open_clip's ``preprocess_cfg`` says besides. Mean and deviation are CLIP's where nothing is said.

    Raises:
        TypeError, ValueError: see :attr:`tpt_fast.models.family.Family.preprocessing`.
    """
    visual = getattr(model, "visual", None)
    if not isinstance(visual, nn.Module):
        raise TypeError(f"model: expected an open_clip model with an image tower, got {type(model).__name__}")
    if isinstance(visual, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        raise TypeError(f"model: expected its image tower itself, got a {type(visual).__name__}; use visual.module")
    cfg = getattr(visual, "preprocess_cfg", None) or {}
    if not isinstance(cfg, Mapping):
        raise TypeError(f"model: expected visual.preprocess_cfg to be a mapping, got {type(cfg).__name__}")
    mean, std = (
        tuple(getattr(visual, f"image_{name}", None) or cfg.get(name) or default)
        for name, default in (("mean", CLIP_MEAN), ("std", CLIP_STD))
    )
    size, mode = _size(visual), _known(cfg, "resize_mode", "shortest", RESIZE_MODES)
    interpolation = _known(cfg, "interpolation", "bicubic", tuple(INTERPOLATIONS))
    if mode == "shortest" and not isinstance(size, int):
        interpolation = "bicubic"  # whatever it says: open_clip's transform takes no other for such sizes
    return Preprocessing(size, mean, std, mode, interpolation, fill=_fill(cfg))


def _fill(cfg: Mapping[str, Any]) -> int:
    value = cfg.get("fill_color") or 0
    if not isinstance(value, int) or not 0 <= value <= 255:
        raise ValueError(f"model: visual.preprocess_cfg says fill_color {value!r}, and 0 to 255 are known here")
    return value


def _size(visual: Foreign) -> int | tuple[int, int]:
    size = getattr(visual, "image_size", getattr(visual, "input_resolution", None))
    if size is None:
        raise ValueError(
            "model: expected its image tower to say the size of its images (visual.image_size), "
            f"{type(visual).__name__} does not"
        )
    height, width = check_size("model: visual.image_size", tuple(size) if isinstance(size, list) else size)
    return height if height == width else (height, width)


def _known(cfg: Mapping[str, Any], name: str, default: str, known: tuple[str, ...]) -> str:
    value = cfg.get(name) or default
    if value not in known:
        raise ValueError(f"model: visual.preprocess_cfg says {name} {value!r}, and {' or '.join(known)} are known here")
    return value


def of_processor(processor: Foreign, size: int) -> Preprocessing:
    """What an image processor of transformers says, for a tower whose images have ``size`` pixels a side.

    Its pixels are those of the processor that resizes by Pillow (``CLIPImageProcessorPil``, before transformers 5
    ``CLIPImageProcessor``), by which, and by Pillow in OpenAI's code, such models have been trained and measured; the
    one that resizes by torchvision differs from it by a level or two of 255.

    Raises:
        ValueError: it prepares images in another way than is known here, or of another size.
    """

    def says(what: str, value: object) -> str:
        return f"model: its image processor says {what} {value!r}"

    by = {3: "bicubic", 2: "bilinear"}
    resample: Any = getattr(processor, "resample", None)
    resample = getattr(resample, "value", resample)
    interpolation = by.get(resample, str(resample))
    if interpolation not in by.values():
        raise ValueError(f"{says('resample', resample)}, and 3 (bicubic) and 2 (bilinear) are known here")
    wanted = {"do_resize": True, "do_rescale": True, "do_pad": False}
    for name, value in wanted.items():
        if bool(getattr(processor, name, value)) != value:
            raise ValueError(f"{says(name, not value)}, and {value} is known here")
    if abs(processor.rescale_factor * 255 - 1) > 1e-9:
        raise ValueError(f"{says('rescale_factor', processor.rescale_factor)}, and 1/255 is known here")
    square, shortest = {"height": size, "width": size}, {"shortest_edge": size}
    to = {name: value for name, value in dict(processor.size).items() if value is not None}
    crops = dict(processor.crop_size) if getattr(processor, "do_center_crop", None) else None
    if (to, crops) not in ((shortest, square), (square, square), (square, None)):
        cut = "" if crops is None else f", cut to {crops}"
        raise ValueError(f"{says('size', to)}{cut}; the model takes {size} x {size}")
    normalises = getattr(processor, "do_normalize", True)
    mean, std = (processor.image_mean, processor.image_std) if normalises else ((0.0,) * 3, (1.0,) * 3)
    return Preprocessing(
        size, tuple(mean), tuple(std), "squash" if to == square else "shortest", interpolation, crop="floor"
    )
