"""Score maps: how much each place of an image is like each class, by the towers as they are: nothing is trained."""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ._checks import check_choice, check_integer, check_number
from ._machine import free_bytes
from ._modes import plain_modes
from .clip import Clip
from .ops.views import views as make
from .text import TextEncoder
from .text.prompts import Tokenizer
from .views.crops import INTERPOLATIONS
from .views.decode import ImageLike, load_image
from .views.make import normalisation_table, pass_order

TOKENS = ("neighbourhood", "raw")
WINDOWS_AT_ONCE = 32  # which bounds the memory that their pixels and features take


def score_map(
    model: nn.Module | Clip,
    image: ImageLike,
    classnames: Sequence[str],
    ctx: Tensor | str | os.PathLike | None = None,
    *,
    tokens: str = "neighbourhood",
    std: float = 5.0,
    size: int | None = None,
    stride: int | None = None,
    ctx_init: str = "a photo of a",
    tokenizer: Tokenizer | None = None,
) -> Tensor:
    """The cosine of each pixel's feature and each class's, without a trained decoder.

    The image is resized until its shorter side has ``size`` pixels, and cut into windows of the model's own image size
    S, which its position embeddings were made for; each window's patches are encoded, compared with the classes and
    enlarged to its pixels (bilinear), and where windows overlap their scores are averaged.

    ``tokens="neighbourhood"`` is NACLIP (Hajimiri, Ben Ayed and Dolz, WACV 2025, https://arxiv.org/abs/2404.08181): the
    last block is its attention alone, without residual and MLP, with keys in the place of queries and a Gaussian of
    the distance that is added to the scores. For a patch at (i, j), each head of width d has ::

        A_ij = softmax(k_ij . k_mn / sqrt(d) + exp(-|(m, n) - (i, j)|^2 / (2 std^2))) v

    over all (m, n), and over the class token, to which nothing is added; all blocks before are as they are.
    ``tokens="raw"`` is what DenseCLIP (Rao et al., CVPR 2022, https://arxiv.org/abs/2112.01518) defines a pixel-text
    score map as: patch tokens of the whole tower. Either goes through the model's last norm and projection and is
    divided by its length.

    Args:
        model: as for :class:`tpt_fast.Tuner`, of which only a vision transformer has what is read here; in a loop, a
            :class:`~tpt_fast.clip.Clip` saves time (``tuner.clip``).
        image: anything that :func:`tpt_fast.load_image` takes.
        classnames: C names.
        ctx: context vectors of the prompt, [n_ctx, width], class-specific [C, n_ctx, width], or a CoOp checkpoint: an
            image's own tuned prompt is ``tpt_fast.tune(...).ctx``. None: the words of ``ctx_init``.
        tokens: "neighbourhood" or "raw".
        std: of the Gaussian, in patches, above 0; NACLIP's 5. Not used for raw tokens.
        size: S or more. None: 3 S / 2, for S = 224 NACLIP's 336.
        stride: from window to window, 1 to S; the last ones of a row and column end where the image does. None: S / 2,
            NACLIP's 112.
        ctx_init: words of the prompt; with ``ctx`` it only says where in it the name stands ("[CLS]").
        tokenizer: see :class:`tpt_fast.Tuner`.

    Returns:
        [C, H, W] float32 on the CPU, of H x W pixels as the image has, in [-1, 1]. NACLIP makes probabilities of them
        by ``(40 * scores).softmax(0)``.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came; a model without patch tokens (a
            ResNet) or one that runs through its own code is refused with the reason.
        OSError: an image file that cannot be read.
    """
    if isinstance(model, Clip) and tokenizer is not None:
        raise ValueError("tokenizer: expected None with a Clip, which has its own")
    clip = model if isinstance(model, Clip) else Clip(model, tokenizer=tokenizer)
    square_grid(clip)
    text = TextEncoder(clip.text, classnames, ctx_init, ctx=ctx)
    features, _ = text.forward(text.ctx_init)
    return scores(clip, image, features, tokens=tokens, std=std, size=size, stride=stride)


@plain_modes
@torch.no_grad()
def scores(
    clip: Clip,
    image: ImageLike,
    features: Tensor,
    *,
    tokens: str = "neighbourhood",
    std: float = 5.0,
    size: int | None = None,
    stride: int | None = None,
) -> Tensor:
    """:func:`score_map` of classes that are encoded already, for many images or for other prompts.

    Args:
        features: [C, D] of length 1: ``tuner.classes.prototypes(templates)`` are means over templates, as NACLIP takes.
        others: see :func:`score_map`.
    """
    if not isinstance(features, Tensor) or features.dim() != 2 or not features.is_floating_point():
        came = f"{features.dtype} {list(features.shape)}" if isinstance(features, Tensor) else type(features).__name__
        raise TypeError(f"features: expected floating point [C, D], got {came}")
    grid, side, patch = square_grid(clip)
    check_choice("tokens", tokens, TOKENS)
    check_number("std", std, "a number above 0", lambda value: value > 0)
    size, stride = 3 * side // 2 if size is None else size, side // 2 if stride is None else stride
    check_integer("size", size, side, 1 << 15)
    check_integer("stride", stride, 1, side)

    pixels = load_image(image).to(clip.device)
    height, width, _ = pixels.shape
    short = min(height, width)
    high, wide = size * height // short, size * width // short
    _check_memory(len(features), (height, width), (high, wide), clip.device)
    filter = INTERPOLATIONS[clip.preprocessing.interpolation]
    corners = [(y, x) for y in places(high, side, stride) for x in places(wide, side, stride)]
    rows = [(0, 0, height, width, high, wide, y, x, 0, filter) for y, x in corners]
    specs = torch.tensor(rows, device="cpu", dtype=torch.int32)
    table = normalisation_table(clip.preprocessing.mean, clip.preprocessing.std, clip.image.dtype, clip.device)
    bias = gaussian(grid, std, clip.device) if tokens == "neighbourhood" else None

    total = torch.zeros(len(features), high, wide, device=clip.device, dtype=torch.float32)
    count = torch.zeros(high, wide, device=clip.device, dtype=torch.float32)
    for first in range(0, len(corners), WINDOWS_AT_ONCE):
        some = slice(first, first + WINDOWS_AT_ONCE)
        windows = make(pixels, specs[some].to(clip.device), table, side, pass_order() == "pillow-13", patch)
        patches = clip.image.encode_patches(windows, bias)
        if features.shape[-1] != patches.shape[-1]:
            raise ValueError(f"features: expected width {patches.shape[-1]}, of the image's, got {features.shape[-1]}")
        found = (patches @ features.to(patches).mT).mT.unflatten(-1, (grid, grid))
        for (y, x), one in zip(corners[some], found):
            total[:, y : y + side, x : x + side] += _resized(one, side, side)
            count[y : y + side, x : x + side] += 1
    return _resized(total / count, height, width).cpu()


def square_grid(clip: Clip) -> tuple[int, int, int]:
    """Patches along a side of a window, its side and a patch's, in pixels."""
    (rows, columns), (height, width) = clip.image.patch_grid(), clip.image.sides
    if rows != columns:
        raise ValueError(f"model: expected one of square images, of which maps are made; its are {height} x {width}")
    return rows, height, height // rows


def places(length: int, side: int, stride: int) -> list[int]:
    """Where windows begin: every ``stride`` pixels, the last one where it ends with the image."""
    return [min(place, length - side) for place in range(0, length - side + stride, stride)]


def gaussian(grid: int, std: float, device: torch.device | str = "cpu") -> Tensor:
    """[grid^2, grid^2] float64 of each patch to each, by their distance on the grid; 1 at distance 0."""
    at = torch.arange(grid, device="cpu", dtype=torch.float64)
    along = (-(at[:, None] - at).square() / (2 * std**2)).exp()
    return torch.kron(along, along).to(device)


def _resized(maps: Tensor, height: int, width: int) -> Tensor:
    return nn.functional.interpolate(maps[None], (height, width), mode="bilinear", align_corners=False)[0]


def _check_memory(classes: int, image: tuple[int, int], resized: tuple[int, int], device: torch.device) -> None:
    """Several maps of the resized size are held at once; the result, where it is made and on the CPU."""
    needed = 4 * classes * (3 * resized[0] * resized[1] + 2 * image[0] * image[1])
    if needed > (free := free_bytes(device)):
        of = f"{classes} classes at {image[0]} x {image[1]} pixels (height x width)"
        raise ValueError(
            f"image: expected one whose map fits in memory; of {of}, made at {resized[0]} x {resized[1]}, it takes "
            f"{needed / 1e9:.3g} GB, and {free / 1e9:.3g} are free"
        )
