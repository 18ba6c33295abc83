"""A CLIP, read once for one precision. It knows no class names."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from . import config
from ._checks import check_choice
from ._modes import plain_modes
from .models import products, read
from .models.weights import PRECISIONS
from .text.prompts import Tokenizer
from .text.tower import TextTower
from .vision import ImageEncoder


class Clip:
    """Both towers of a model with their weights in one precision, which any number of class lists share.

    The model itself is left alone: its weights are read, and no mark is kept on it. Weights that change afterwards need
    a new ``Clip``. Calls from several threads are safe.

    Args:
        model: an open_clip ``CLIP`` or ``CustomTextCLIP``, or transformers' ``CLIPModel``, ``MetaClip2Model`` or
            ``SiglipModel``, or what OpenAI's ``clip.load`` gives, on the CPU or on CUDA; wrappers around the whole
            of it (``DataParallel``, ``DistributedDataParallel``, ``torch.compile``) are looked through.
        precision: what the towers hold their weights in: "fp32", "fp16" or "bf16"; or "auto", see
            :class:`tpt_fast.TuneConfig`.
        tokenizer: callable ``texts -> int64 [n, context length]``, or transformers' tokenizer or processor, which also
            says how its models' images are prepared; default: the model's own.
        engine: how the text tower runs, "auto", "packed" or "module", see :class:`tpt_fast.TuneConfig`.
        autocast: float32 weights, run by the model's own modules under fp16 autocast, as the published code runs them
            on a GPU; ``precision`` must be "fp16".

    Attributes:
        image: :class:`~tpt_fast.vision.ImageEncoder`; text: :class:`~tpt_fast.text.tower.TextTower`.
        precision: what they are held in, "auto" no more; autocast: as given.
        scale: [] float32, exp(logit scale); bias: [] the logit bias of models trained by a sigmoid loss, or None.
        preprocessing: size, mean and deviation of its images.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
    """

    @plain_modes
    def __init__(
        self,
        model: nn.Module,
        precision: str = "fp32",
        *,
        tokenizer: Tokenizer | None = None,
        engine: str = "auto",
        autocast: bool = False,
    ) -> None:
        check_choice("precision", precision, config.PRECISIONS)
        if autocast and precision != "fp16":
            raise ValueError(f"precision: expected 'fp16' with autocast, got {precision!r}")
        self._family = family = read(model, tokenizer)
        if precision == "auto":
            precision = products.fastest_precision(next(family.model.parameters()).device)
        self.precision, self.autocast = precision, autocast
        self.preprocessing = family.preprocessing
        self.scale, self.bias = family.scale, family.bias
        if self.device.type not in ("cpu", "cuda"):
            raise ValueError(f"model: expected it on the CPU or on CUDA, got it on {self.device}")
        held, by = ("fp32", "module") if autocast else (precision, "auto")
        self.image = ImageEncoder(family, PRECISIONS[held], by, autocast=autocast)
        self.text = TextTower(
            family, held, tokenizer=tokenizer, engine="module" if autocast else engine, autocast=autocast
        )

    @classmethod
    def of(cls, model: nn.Module | Clip, wanted: config.TuneConfig, tokenizer: Tokenizer | None = None) -> Clip:
        """``model`` read as the options ask for it, unless it has been read so already.

        Raises:
            ValueError: it has been read in another way, or a ``tokenizer`` is given beside its own.
        """
        if not isinstance(model, Clip):
            return cls(model, wanted.precision, tokenizer=tokenizer, engine=wanted.engine, autocast=wanted.autocasts)
        if tokenizer is not None:
            raise ValueError("tokenizer: expected None with a Clip, which has its own")
        for name, has, asked in (
            ("precision", model.precision, model.precision if wanted.precision == "auto" else wanted.precision),
            ("engine", model.text.wanted, wanted.engine),
            ("strict_official", model.autocast, wanted.autocasts),
        ):
            if has != asked:
                raise ValueError(f"{name}: expected {has!r}, for the Clip was read so, got {asked!r}")
        return model

    @property
    def model(self) -> nn.Module:
        """The model itself, out of its wrappers."""
        return self._family.model

    @property
    def device(self) -> torch.device:
        """Where the model is, and everything runs."""
        return self.scale.device

    def encode(self, views: Tensor, normalise: bool = True) -> Tensor:
        """Features of the views of B images.

        Args:
            views: [B, N, 3, H, W], or cut into patches, as :meth:`tpt_fast.vision.ImageEncoder.encode` takes them.

        Returns:
            [B, N, D] of length 1 unless not to ``normalise``, float32 (float64 for a float64 tower).
        """
        if self.autocast:  # as published: one image after the other
            return torch.stack([self.image.encode(each, normalise) for each in views])
        return self.image.encode(views.flatten(0, 1), normalise).view(*views.shape[:2], -1)

    def __repr__(self) -> str:
        height, width = self.preprocessing.sides
        image = f"{self.image.engine} {height if height == width else f'{height} x {width}'} px"
        return f"Clip({type(self.model).__name__}, {self.precision}, image {image}, {self.device})"
