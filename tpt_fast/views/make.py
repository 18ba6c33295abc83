"""From a picture to its normalised views, as PIL makes them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from .. import ops
from .._checks import MAX_SEED, check_choice, check_integer, check_numbers, check_patch, check_size
from .._modes import ON_THE_CPU
from ..config import VIEWS
from ..reference.views import patches
from .augmix import AugMix, augmix_steps, draw_augmix
from .crops import check_generator, draw_boxes, draw_specs, view_specs
from .decode import load_image
from .longest import fitted_view

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

RESIZE_MODES = ("shortest", "squash", "longest")  #: of view 0
PASS_ORDERS = ("pillow-12", "pillow-13")


def pass_order() -> str:
    """The order in which the installed Pillow resizes: "pillow-12" (and before) does the width first, but for slivers.

    "pillow-13" (and after, and where there is no Pillow) does the height first where it shrinks much the more. Each
    pass rounds to bytes, so views made in another order differ in the last bit; see :func:`tpt_fast.ops.views`.
    """
    try:
        from PIL import __version__
    except ImportError:
        return "pillow-13"
    return "pillow-13" if int(__version__.partition(".")[0]) >= 13 else "pillow-12"


@lru_cache(maxsize=64)
def normalisation_table(
    mean: tuple[float, ...] = CLIP_MEAN,
    std: tuple[float, ...] = CLIP_STD,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Tensor:
    """[3, 256]: what ToTensor and Normalize make of each byte of each channel, in float32, then rounded to ``dtype``.

    Cached and shared: do not write to it.

    Raises:
        ValueError: not three means and three standard deviations, or a standard deviation of zero.
    """
    check_numbers("mean", mean, 3)
    if 0 in check_numbers("std", std, 3):
        raise ValueError(f"std: expected 3 numbers other than 0, got {std}")
    levels = torch.arange(256, **ON_THE_CPU).div(255).expand(3, 256).clone()
    levels.sub_(torch.tensor(mean, **ON_THE_CPU)[:, None]).div_(torch.tensor(std, **ON_THE_CPU)[:, None])
    table = levels.to(device, dtype)
    if table.is_cuda:  # it is cached, and other streams may read it: they could not know when this one has filled it
        torch.cuda.current_stream(table.device).synchronize()
    return table


@lru_cache(maxsize=64)
def _bytes(device: torch.device) -> Tensor:
    """[3, 256]: each byte as it is."""
    return torch.arange(256, device="cpu", dtype=torch.uint8).expand(3, 256).to(device)


def make_views(
    image: Any,
    n_views: int = 64,
    size: int | tuple[int, int] = 224,
    seed: int | None = 0,
    boxes: Any = None,
    *,
    mean: Sequence[float] = CLIP_MEAN,
    std: Sequence[float] = CLIP_STD,
    dtype: torch.dtype = torch.float32,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
    order: str | None = None,
    patch: int | None = None,
    resize_mode: str = "shortest",
    interpolation: str = "bicubic",
    crop: str = "round",
    fill: int = 0,
    views: str | AugMix = "crops",
) -> Tensor:
    """The views of test-time prompt tuning: view 0 the plain preprocessed image, the others random crops and flips,
    mixed by AugMix if asked for.

    The pixels equal torchvision's on PIL images to the bit (``Resize(bicubic)`` and ``CenterCrop`` for view 0,
    ``RandomResizedCrop`` and ``RandomHorizontalFlip`` for the others, ``ToTensor``, ``Normalize``), and so do the drawn
    crops, for the same seed.

    Args:
        image: whatever :func:`tpt_fast.views.decode.load_image` takes.
        n_views: N, at least 1; not used where ``boxes`` are given.
        size: S, pixels of a side, or (height, width) of the views, each in 1..32768.
        seed: of the crops; None draws them from torch's global generator, as the published code does. Not used where
            ``boxes`` or ``generator`` are given.
        boxes: integers [N-1, 5] (top, left, height, width, flip) instead of random ones.
        mean: of each channel, pixels being in [0, 1]; CLIP's by default.
        std: likewise, not 0.
        dtype: float32, float16 or bfloat16 (rounded from float32).
        generator: to draw the crops from. One on the CPU gives torchvision's; one on a GPU draws there
            (:func:`draw_specs`), without waiting for it, where the views are made on that GPU.
        device: where the views are made; the image's own device by default, which is the CPU unless it is a tensor.
        order: "pillow-12" or "pillow-13", see :func:`pass_order`; None follows the installed Pillow.
        patch: P, a divisor of both sides, to have the views cut into the patches of a vision transformer.
        resize_mode, interpolation, crop: of view 0, see :func:`tpt_fast.views.view_specs`; CLIP's by default. Mode
            "longest" too: the largest that fits into the view, and around it a margin of byte ``fill``, 0 to 255.
        views: "crops", or "augmix": each crop is mixed with three chains of operations on it, after normalisation
            (:func:`tpt_fast.ops.augmix`), as the published code does for the fine-grained sets. These draw from NumPy,
            by the same ``seed``: :func:`tpt_fast.views.draw_augmix`, whose draws for N - 1 views may be given instead.

    Returns:
        [N, 3, height, width] in ``dtype``; with ``patch`` [N, height / P * width / P, 3 P^2], see
        :func:`tpt_fast.ops.views`.

    Raises:
        ValueError: an argument out of range, a box outside the image, or an image that cannot be used.
        TypeError: an argument of another type.
        OSError: an image file that cannot be read.
    """
    if dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise TypeError(f"dtype: expected torch.float32, float16 or bfloat16, got {dtype}")
    high, wide = check_size("size", size)
    if boxes is None:
        check_integer("n_views", n_views, 1)
        if seed is not None:
            check_integer("seed", seed, 0, MAX_SEED)
    if patch is not None:
        check_integer("patch", patch, 1)
    check_patch(patch, high, wide)
    check_generator(generator)
    if not isinstance(views, AugMix):
        check_choice("views", views, VIEWS)
        if views == "augmix" and generator is not None:
            raise ValueError("generator: expected None with views='augmix', which draws from NumPy by the seed")
    mean, std = check_numbers("mean", mean, 3), check_numbers("std", std, 3)
    check_integer("fill", fill, 0, 255)
    check_choice("resize_mode", resize_mode, RESIZE_MODES)
    fits = resize_mode == "longest"  # made on its own, and what has its place until then is of no account
    plain: dict[str, Any] = {"resize_mode": "squash" if fits else resize_mode, "interpolation": interpolation}
    plain["crop"] = crop
    if order is None:
        order = pass_order()
    else:
        check_choice("order", order, PASS_ORDERS)
    pixels = load_image(image)
    if device is not None:
        pixels = pixels.to(device)
    height, width, _ = pixels.shape
    if boxes is None and generator is not None and generator.device.type != "cpu":
        specs = draw_specs(height, width, n_views, (high, wide), generator=generator, **plain)
    else:
        if boxes is None:
            boxes = draw_boxes(height, width, n_views - 1, seed=seed, generator=generator)
        specs = view_specs(height, width, torch.as_tensor(boxes, device="cpu"), (high, wide), **plain)
        specs = specs.to(pixels.device, non_blocking=True)
    vertical_first = order == "pillow-13"

    def made(table: Tensor, patch: int | None) -> Tensor:
        found = ops.views(pixels, specs, table, (high, wide), vertical_first, patch)
        if fits:
            first = fitted_view(pixels, table, (high, wide), vertical_first, interpolation, fill)
            found[0] = first if patch is None else patches(first[None], patch, patch)[0]
        return found

    if views == "crops":
        return made(normalisation_table(mean, std, dtype, pixels.device), patch)
    crops = made(_bytes(pixels.device), None)
    draws = views if isinstance(views, AugMix) else draw_augmix(len(specs) - 1, seed=seed)
    if len(draws.weights) != len(specs) - 1:
        raise ValueError(f"views: expected draws of AugMix for {len(specs) - 1} views, got {len(draws.weights)}")
    mixed = augmix_steps(draws, (high, wide))
    steps, parameters, weights = (each.to(pixels.device, non_blocking=True) for each in mixed)
    table = normalisation_table(mean, std, device=pixels.device)
    return ops.augmix(crops, steps, parameters, weights, table, dtype, patch)
