"""The image tower by the fastest way that represents it exactly."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..models import read
from ..models.family import Family
from ..models.weights import Foreign, ImageWeights, Unsupported
from ..ops._types import accumulation_dtype
from .module import ModuleTower
from .resnet import ResNetTower
from .vit import VitTower


class ImageEncoder:
    """The image tower of ``model`` with its weights in ``dtype``, which are shared with the model where it has that
    type (and copied where our own product is the faster one, see :mod:`tpt_fast.models.matrix`). The model
    itself stays as it is. Calls from several threads are safe. ``engine="module"`` runs the model's own code in any
    case, ``autocast`` under fp16 autocast.

    Attributes:
        sides: (H, W) of the images.
        patch: side P of the patches into which views for :meth:`encode` may come cut already; None if they may not.
        engine: "vit" (our own executor of CLIP's vision transformers), "resnet" (CLIP's ResNets, folded), or
            "module" (the model's own code).
        why_module: why the model's own code runs; None where it does not.

    Raises:
        TypeError: the model has no image tower.
    """

    def __init__(self, model: Foreign, dtype: torch.dtype, engine: str = "auto", *, autocast: bool = False) -> None:
        family = read(model)
        self.sides = family.preprocessing.sides
        self.dtype = dtype
        self.patch: int | None = None
        self.why_module: str | None = None
        self._of = family, engine, autocast
        self._tower = self._choose(*self._of)
        self.engine = self._tower.name
        if isinstance(self._tower, VitTower):
            height, width = self._tower.patch
            if height == width and not any(side % height for side in self.sides):
                self.patch = height

    # --- for copies, perhaps in another process: what is made of the weights is made anew

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_tower": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._tower = self._choose(*self._of)

    def _choose(self, family: Family, engine: str, autocast: bool) -> VitTower | ResNetTower | ModuleTower:
        try:
            if engine == "module":
                raise Unsupported("engine='module' was asked for")
            weights = family.image_weights(self.dtype)
            if isinstance(weights, ImageWeights):
                return VitTower(weights, self.sides)
            return ResNetTower(weights, self.dtype)
        except Unsupported as reason:
            self.why_module = str(reason)
            return ModuleTower(family.for_images(self.dtype), autocast)

    @property
    def laid_out(self) -> bool:
        """Whether a second copy of the weights is held, in the layout of our own product."""
        return getattr(self._tower, "laid_out", False)

    def tensors(self) -> list[Tensor]:
        """What the tower holds."""
        return self._tower.tensors()

    @torch.no_grad()
    def encode(self, views: Tensor, normalise: bool = True) -> Tensor:
        """Features of length 1, or as the tower gives them.

        Args:
            views: [N, 3, H, W] floating point, normalised, on the model's device; or cut into patches,
                [N, H / P * W / P, 3 P^2], as :func:`tpt_fast.make_views` makes them with ``patch``.

        Returns:
            [N, D] float32 (float64 for a float64 tower).

        Raises:
            ValueError: views of another shape.
        """
        features = self._in_groups(self._tower.encode, views)
        return nn.functional.normalize(features, dim=-1) if normalise else features

    @torch.no_grad()
    def encode_patches(self, views: Tensor, bias: Tensor | None = None) -> Tensor:
        """Features of length 1 of each patch, instead of the class token.

        Args:
            views: as for :meth:`encode`.
            bias: [H / P * W / P] twice, added to the scores of the last block's attention, whose queries are its keys
                then, and whose output alone is read (see :func:`tpt_fast.score_map`); None: the tower as it is.

        Returns:
            [N, H / P * W / P, D], row by row of the view.

        Raises:
            ValueError: views of another shape, or as for :meth:`patch_grid`.
        """
        self.patch_grid()
        tower = self._tower
        assert isinstance(tower, VitTower)
        return nn.functional.normalize(self._in_groups(lambda group: tower.encode_patches(group, bias), views), dim=-1)

    def patch_grid(self) -> tuple[int, int]:
        """Patches down and across a view.

        Raises:
            ValueError: a tower other than our own vision transformer, or one whose patches are no squares, or do not
                fill its images.
        """
        if self.patch is not None:
            return self.sides[0] // self.patch, self.sides[1] // self.patch
        why = self.why_module
        if isinstance(self._tower, ResNetTower):
            why = "it is a ResNet, which has none"
        elif isinstance(self._tower, VitTower):
            height, width = self._tower.patch
            why = "its patches do not fill its images" if height == width else f"its patches are {height} x {width}"
        raise ValueError(f"model: expected a vision transformer whose patch tokens can be read; {why}")

    def _in_groups(self, encode: Callable[[Tensor], Tensor], views: Tensor) -> Tensor:
        if views.shape[1:] not in self._shapes():
            expected = " or ".join(f"[N, {', '.join(map(str, shape))}]" for shape in self._shapes())
            raise ValueError(f"views: expected {expected}, got {list(views.shape)}")
        groups = max(1, -(-len(views) // self._tower.at_once(views.device)))
        features = torch.cat([encode(group.to(self.dtype)) for group in views.tensor_split(groups)])
        return features.to(accumulation_dtype(self.dtype))

    def whole(self, views: Tensor) -> Tensor:
        """[N, 3, H, W] of views that may be cut into patches."""
        if views.dim() == 4 or self.patch is None:
            return views
        cut = views.unflatten(-1, (3, self.patch, self.patch)).unflatten(1, self.patch_grid())
        return cut.permute(0, 3, 1, 4, 2, 5).reshape(len(views), 3, *self.sides)

    def _shapes(self) -> list[tuple[int, ...]]:
        """What a view may look like."""
        cut = [(math.prod(self.patch_grid()), 3 * self.patch**2)] if self.patch else []
        return [(3, *self.sides), *cut]
