"""Training images as features: encoded once, however many epochs read them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from .. import ops
from .._checks import MAX_SEED, check_integer
from .._modes import plain_modes
from ..clip import Clip
from ..views.crops import INTERPOLATIONS, draw_boxes, view_specs
from ..views.decode import UNREADABLE, ImageLike, load_image
from ..views.make import make_views, normalisation_table, pass_order

AT_ONCE = 64  # views that pass through the image tower together


@plain_modes
@torch.no_grad()
def encode_examples(
    model: nn.Module | Clip, images: Sequence[ImageLike], *, views: int = 8, seed: int = 1, progress: bool = True
) -> Tensor:
    """Features of training images, as CoOp's trainer sees them: random resized crops (area 0.08 to 1, aspect 3/4 to
    4/3), bicubic, and flips.

    Args:
        model: see :class:`~tpt_fast.Tuner`.
        images: N images as :func:`tpt_fast.load_image` takes them.
        views: V of each image; 0 for the plain image alone, as it is classified.
        seed: of the crops, which depend on it and on an image's place in the list.
        progress: whether to draw a bar.

    Returns:
        [N, V, D] of length 1 (V = 1 for the plain image), float32, on the model's device.

    Raises:
        TypeError, ValueError, OSError: an image that cannot be read, naming its place.
    """
    from tqdm.auto import tqdm

    check_integer("views", views, 0)
    check_integer("seed", seed, 0, MAX_SEED)
    if isinstance(images, (str, Tensor)) or not isinstance(images, Sequence) or not len(images):
        raise TypeError(f"images: expected a list of images, got {type(images).__name__} {images!r:.40}")
    clip = model if isinstance(model, Clip) else Clip(model)
    found: list[Tensor] = []
    waiting: list[Tensor] = []
    each = max(1, views)
    for i, image in enumerate(tqdm(images, "encoding", unit="image", disable=not progress, leave=False)):
        try:
            waiting.append(_crops(clip, load_image(image), views, seed, i))
        except UNREADABLE as error:
            *before, message = error.args or ("",)
            raise type(error)(*before, f"images[{i}]: {message}") from error
        if (len(waiting) + 1) * each > AT_ONCE or i == len(images) - 1:
            found.append(clip.image.encode(torch.cat(waiting)).view(len(waiting), each, -1))
            waiting = []
    return torch.cat(found)


def _crops(clip: Clip, pixels: Tensor, views: int, seed: int, place: int) -> Tensor:
    """[V, ...] views as the image tower takes them."""
    pixels, prepared, patch = pixels.to(clip.device), clip.preprocessing, clip.image.patch
    if not views:
        return make_views(pixels, 1, dtype=clip.image.dtype, patch=patch, **prepared._asdict())
    height, width, _ = pixels.shape
    own = int(np.random.SeedSequence([seed, place]).generate_state(1, np.uint64)[0])
    specs = view_specs(height, width, draw_boxes(height, width, views, seed=own), prepared.size)[1:]
    specs[:, 9] = INTERPOLATIONS["bicubic"]
    table = normalisation_table(prepared.mean, prepared.std, clip.image.dtype, clip.device)
    return ops.views(pixels, specs.to(clip.device), table, prepared.size, pass_order() == "pillow-13", patch)


def check_features(features: Tensor, like: Tensor, name: str = "images") -> Tensor:
    """Of length 1, as the text features are, with which they are compared."""
    width = like.shape[-1]
    if not features.is_floating_point() or features.dim() != 3 or features.shape[-1] != width or 0 in features.shape:
        raise ValueError(
            f"{name}: expected a list, or features [N, V, {width}], got {features.dtype} {list(features.shape)}"
        )
    if not features.isfinite().all():
        raise ValueError(f"{name}: expected finite features, got NaN or infinity")
    return nn.functional.normalize(features.detach().to(like), dim=-1)
