"""Views of one image: drawing the crops as torchvision draws them, and making them as PIL makes them."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from .._checks import check_choice, check_integer, check_numbers, check_size
from .._modes import ON_THE_CPU

BILINEAR, BICUBIC = 0, 1  #: filters of a spec row
INTERPOLATIONS = {"bicubic": BICUBIC, "bilinear": BILINEAR}  #: of view 0
RESIZE_MODES = ("shortest", "squash")  #: of view 0 as a row: "longest" takes several, see fitted_view
#: Where the window of view 0 begins that would begin between two pixels.
CROPS: dict[str, Callable[[float], int]] = {"round": round, "floor": math.floor}

_INT32_MAX = 2**31 - 1
_TRIES = 10  # of torchvision's RandomResizedCrop before it falls back to a central crop


def draw_boxes(
    height: int,
    width: int,
    n: int,
    *,
    seed: int | None = 0,
    generator: torch.Generator | None = None,
    scale: tuple[float, float] = (0.08, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
) -> Tensor:
    """Draw ``n`` random resized crops and flips exactly as torchvision does, view by view, from the same stream.

    The numbers, and the state in which ``generator`` is left, are those of ``n`` times
    ``RandomResizedCrop.get_params`` and ``torch.rand(1) < 0.5`` with torch's CPU generator in the same state.

    Args:
        height: of the image, at least 1.
        width: likewise.
        n: number of boxes, at least 0.
        seed: of a fresh generator; None draws from torch's global one, as the published code does.
        generator: a CPU generator to use instead.
        scale: range of the crop's share of the area, 0 < low <= high.
        ratio: range of the crop's width / height, 0 < low <= high; drawn log-uniformly.

    Returns:
        int32 [n, 5]: top, left, height, width, flip.

    Raises:
        ValueError: an argument out of range.
        TypeError: an argument of another type.
    """
    _check_draw(height, width, n, scale, ratio)
    check_generator(generator)
    if generator is None:
        generator = torch.default_generator if seed is None else torch.Generator().manual_seed(seed)
    if generator.device.type != "cpu":
        raise ValueError(f"generator: expected a CPU generator, got one on {generator.device}")
    if n == 0:
        return torch.empty(0, 5, dtype=torch.int32, device="cpu")

    # Every scalar draw takes one 32-bit number of the stream and does not depend on its neighbours. So each kind of
    # draw is made at every position of the stream at once, and the decisions are then a walk over the positions:
    # scale and ratio (up to ten times), top, left, flip.
    span = n * (2 * _TRIES + 3)
    count = (span + 5) // 2 * 2
    shares = torch.empty(count, **ON_THE_CPU).uniform_(*scale, generator=generator.clone_state())
    log_ratio = torch.log(torch.tensor(ratio, **ON_THE_CPU)).tolist()
    ratios = torch.empty(count, **ON_THE_CPU).uniform_(*log_ratio, generator=generator.clone_state()).exp()
    pairs = torch.empty(count // 2, dtype=torch.int64, device="cpu")
    pairs.random_(-(2**63), None, generator=generator.clone_state())
    raw = np.stack((pairs.numpy() >> 32 & 0xFFFFFFFF, pairs.numpy() & 0xFFFFFFFF), axis=1).ravel()

    area, aspect = height * width * shares.double().numpy()[:span], ratios.double().numpy()[1 : span + 1]
    widths = np.rint(np.sqrt(area * aspect)).astype(np.int64)
    heights = np.rint(np.sqrt(area / aspect)).astype(np.int64)
    fits = ((widths > 0) & (widths <= width) & (heights > 0) & (heights <= height)).tolist()
    tops = (raw[2 : span + 2] % np.maximum(height - heights + 1, 1)).tolist()
    lefts = (raw[3 : span + 3] % np.maximum(width - widths + 1, 1)).tolist()
    flips = (raw >> 23 & 1 ^ 1).tolist()  # torch.rand(1) < 0.5: of its 24 bits the highest is zero

    boxes = np.empty((n, 5), dtype=np.int32)
    at = 0
    for row in range(n):
        for _ in range(_TRIES):
            if fits[at]:
                boxes[row] = tops[at], lefts[at], heights[at], widths[at], flips[at + 4]
                at += 5
                break
            at += 2
        else:
            boxes[row] = *_central_box(height, width, ratio), flips[at]
            at += 1
    torch.empty(at, **ON_THE_CPU).uniform_(generator=generator)  # leaves it where the scalar draws would have
    return torch.from_numpy(boxes)


def draw_specs(
    height: int,
    width: int,
    n_views: int,
    size: int | tuple[int, int],
    *,
    generator: torch.Generator,
    scale: tuple[float, float] = (0.08, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
    resize_mode: str = "shortest",
    interpolation: str = "bicubic",
    crop: str = "round",
) -> Tensor:
    """Draw the crops where ``generator`` is and put them in rows for :func:`tpt_fast.ops.views`, view 0 first.

    They have the distribution of :func:`draw_boxes`, but are other numbers: each view has its ten tries at once.
    Nothing waits for the device, so this can be captured in a CUDA graph, whose replays draw anew.

    Args:
        height, width, scale, ratio: as for :func:`draw_boxes`.
        n_views: N, at least 1.
        size: S, or (height, width) of the views.
        generator: on any device.
        resize_mode, interpolation: of view 0, see :func:`view_specs`.

    Returns:
        int32 [N, 10] on the generator's device.

    Raises:
        ValueError: an argument out of range.
    """
    _check_draw(height, width, n_views - 1, scale, ratio)
    device, n = generator.device, n_views - 1

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator, device=device, dtype=torch.float64)

    area = height * width * (scale[0] + (scale[1] - scale[0]) * uniform(n, _TRIES))
    aspect = (math.log(ratio[0]) + math.log(ratio[1] / ratio[0]) * uniform(n, _TRIES)).exp()
    widths, heights = (area * aspect).sqrt().round(), (area / aspect).sqrt().round()
    fits = (widths > 0) & (widths <= width) & (heights > 0) & (heights <= height)
    first, some = fits.int().argmax(1, keepdim=True), fits.any(1)
    corner, flip = uniform(n, 2), uniform(n) < 0.5
    central = _central_box(height, width, ratio)
    crop_height = torch.where(some, heights.gather(1, first)[:, 0], central[2])
    crop_width = torch.where(some, widths.gather(1, first)[:, 0], central[3])
    top = torch.where(some, (corner[:, 0] * (height - crop_height + 1)).floor(), central[0])
    left = torch.where(some, (corner[:, 1] * (width - crop_width + 1)).floor(), central[1])

    specs = torch.zeros(n_views, 10, dtype=torch.int32, device=device)
    for column, value in enumerate(_plain_spec(height, width, size, resize_mode, interpolation, crop)):
        if value:
            specs[0, column].fill_(value)
    specs[1:, :4] = torch.stack([top, left, crop_height, crop_width], 1).int()
    for column, side in zip((4, 5), check_size("size", size), strict=True):
        specs[1:, column].fill_(side)
    specs[1:, 8] = flip.int()
    return specs


def check_generator(generator: object) -> None:
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(f"generator: expected a torch.Generator or None, got {type(generator).__name__}")


def _check_draw(height: int, width: int, n: int, scale: tuple[float, float], ratio: tuple[float, float]) -> None:
    for name, value, minimum in (("height", height, 1), ("width", width, 1), ("n", n, 0)):
        check_integer(name, value, minimum, _INT32_MAX if minimum else None)
    for name, pair in (("scale", scale), ("ratio", ratio)):
        low, high = check_numbers(name, pair, 2)
        if not 0 < low <= high:
            raise ValueError(f"{name}: expected 0 < low <= high, got {(low, high)}")


def _central_box(height: int, width: int, ratio: tuple[float, float]) -> tuple[int, int, int, int]:
    crop_height, crop_width = height, width
    if width / height < min(ratio):
        crop_height = round(width / min(ratio))
    elif width / height > max(ratio):
        crop_width = round(height * max(ratio))
    return (height - crop_height) // 2, (width - crop_width) // 2, crop_height, crop_width


def view_specs(
    height: int,
    width: int,
    boxes: Tensor,
    size: int | tuple[int, int],
    resize_mode: str = "shortest",
    interpolation: str = "bicubic",
    crop: str = "round",
) -> Tensor:
    """Rows for :func:`tpt_fast.ops.views`: view 0, then one view a box.

    View 0 is torchvision's ``Resize(size, bicubic)`` of the shorter side and ``CenterCrop(size)``, unless other
    arguments say otherwise; the others are bilinear resized crops, mirrored where asked.

    Args:
        height: of the image.
        width: likewise.
        boxes: integers [N-1, 5]: top, left, height, width, flip, inside the image.
        size: S, or (height, width) of the views.
        resize_mode: "shortest" (the smallest that covers the view, and its middle cut out) or "squash".
        interpolation: "bicubic" or "bilinear".
        crop: where the middle begins that would begin between two pixels: "round" (torchvision) or "floor".

    Returns:
        int32 [N, 10].

    Raises:
        ValueError: boxes of another shape, or one that is not inside the image; another mode or interpolation; an image
            so long that view 0's longer side does not fit int32.
        TypeError: boxes that are no tensor.
    """
    if not isinstance(boxes, Tensor):
        raise TypeError(f"boxes: expected a tensor, got {type(boxes).__name__}")
    rows = boxes.detach().cpu().numpy()
    if rows.ndim != 2 or rows.shape[1] != 5:
        raise ValueError(f"boxes: expected [N-1, 5] (top, left, height, width, flip), got {list(rows.shape)}")
    if rows.dtype.kind not in "iu":
        raise ValueError(f"boxes: expected integers, got {rows.dtype}")
    # Nothing is added before it is known to be small: sums of large numbers wrap, in any integer type.
    inside = np.all((rows[:, :4] >= (0, 0, 1, 1)) & (rows[:, :4] <= (height, width, height, width)), axis=1)
    small = rows[inside, :4].astype(np.int64)
    inside[inside] = (small[:, :2] + small[:, 2:] <= (height, width)).all(1)
    if not inside.all():
        row = int(np.argmin(inside))
        raise ValueError(
            f"boxes: expected boxes (top, left, height, width, flip) inside the image of {height} x {width} "
            f"(height x width), got {rows[row].tolist()} in row {row}"
        )
    specs = np.zeros((len(rows) + 1, 10), dtype=np.int32)
    specs[0] = _plain_spec(height, width, size, resize_mode, interpolation, crop)
    specs[1:, :4] = rows[:, :4]
    specs[1:, 4:6] = check_size("size", size)
    specs[1:, 8] = rows[:, 4] != 0
    specs[1:, 9] = BILINEAR
    return torch.from_numpy(specs)


def _plain_spec(
    height: int, width: int, size: int | tuple[int, int], resize_mode: str, interpolation: str, crop: str
) -> tuple[int, ...]:
    """View 0: the whole image, resized until it just covers the view and the middle cut out, or squashed."""
    check_choice("resize_mode", resize_mode, RESIZE_MODES)
    check_choice("interpolation", interpolation, tuple(INTERPOLATIONS))
    check_choice("crop", crop, tuple(CROPS))
    high, wide = check_size("size", size)
    if resize_mode == "squash":
        return 0, 0, height, width, high, wide, 0, 0, 0, INTERPOLATIONS[interpolation]
    out_height, out_width = high, wide
    if high != wide:  # open_clip's ResizeKeepRatio, which rounds; torchvision's Resize of one side does not
        ratio = min(height / high, width / wide)
        out_height, out_width = round(height / ratio), round(width / ratio)
    elif width <= height:
        out_height = int(high * height / width)
    else:
        out_width = int(wide * width / height)
    if max(out_height, out_width) > _INT32_MAX:
        raise ValueError(
            f"image: {height} x {width} (height x width) is too long and narrow: with its shorter side resized to "
            f"{min(high, wide)} the longer one has {max(out_height, out_width)} pixels, more than {_INT32_MAX}"
        )
    top, left = (CROPS[crop]((resized - side) / 2) for resized, side in ((out_height, high), (out_width, wide)))
    return 0, 0, height, width, out_height, out_width, top, left, 0, INTERPOLATIONS[interpolation]
