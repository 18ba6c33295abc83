"""Everything that can be chosen about tuning, validated when it is made."""

from __future__ import annotations

import os
from dataclasses import dataclass

from torch import Tensor

from ._checks import MAX_SEED, check_choice, check_integer, check_number
from .views.decode import DECODERS

PRECISIONS = ("fp32", "fp16", "bf16")
ENGINES = ("auto", "packed", "module")
ACTIVATIONS = ("keep", "recompute")


@dataclass(frozen=True)
class TuneConfig:
    """Options of :class:`tpt_fast.Tuner`. The defaults are the paper's (Shu et al., NeurIPS 2022, section 4.1).

    Raises:
        TypeError, ValueError: naming the option, what was expected and what came.
    """

    n_views: int = 64
    """Views of the image, 2 or more; the first is the plain image. Paper: 64."""
    rho: float = 0.1
    """Part of the views that is kept, in (0, 1]: the int(n_views * rho) most confident, at least one. Paper: 0.1."""
    steps: int = 1
    """AdamW steps, 0 or more; 0 is zero-shot classification. Paper: 1."""
    lr: float = 5e-3
    """Learning rate, 0 or more. Paper: 5e-3."""
    weight_decay: float = 0.01
    """AdamW's decoupled weight decay, 0 or more. Published code: 0.01, torch's default."""
    ctx_init: str = "a photo of a"
    """Words whose embeddings the context starts from. "[CLS]" marks the place of the class name, which otherwise comes
    last. Paper: "a photo of a"."""
    n_ctx: int | None = None
    """Number of context vectors for a random start (normal, deviation 0.02, from ``seed``) instead of ``ctx_init``."""
    ctx: Tensor | str | os.PathLike | None = None
    """Context to start from, before ``ctx_init``: a float tensor [n_ctx, width], class-specific [C, n_ctx, width], or
    the path of a CoOp checkpoint."""
    precision: str = "fp32"
    """What the towers hold their weights in: "fp32", "fp16" or "bf16". Logits, loss and context are float32 always.
    "fp32" leaves it to PyTorch whether a GPU's products round to TF32: of convolutions, which ResNets have, they do
    unless ``torch.backends.cudnn.allow_tf32`` is False."""
    seed: int = 0
    """Seed of the views (the same for every image, so results do not depend on the order) and of a random context."""
    strict_official: bool = False
    """Follow the published code where the defaults are better: views are drawn from torch's global generator, and fewer
    than one kept view is an error. With precision "fp16" also its precision, and its speed: float32 weights under
    autocast, fp16 logits, and a GradScaler that all images share."""
    engine: str = "auto"
    """How the text tower runs: "packed" computes what the classes share once, "module" is the model's own code, "auto"
    takes "packed" where it is exact."""
    activations: str = "keep"
    """"keep" the text tower's activations for the backward pass, as far as memory allows, or "recompute" them."""
    decoder: str = "pillow"
    """What decodes JPEG files: "pillow", as published, or "torchvision" on the model's device, which on a GPU is faster
    and rounds differently."""
    cuda_graphs: bool = True
    """On CUDA, capture the loop once for each number of images at a time and replay it; not with an own objective."""

    def __post_init__(self) -> None:
        check_integer("n_views", self.n_views, 2)
        check_number("rho", self.rho, "a number in (0, 1]", lambda v: 0 < v <= 1)
        check_integer("steps", self.steps, 0)
        check_number("lr", self.lr, "a number of 0 or more", lambda v: v >= 0)
        check_number("weight_decay", self.weight_decay, "a number of 0 or more", lambda v: v >= 0)
        if not isinstance(self.ctx_init, str):
            raise TypeError(f"ctx_init: expected a string, got {type(self.ctx_init).__name__}")
        if self.n_ctx is not None:
            check_integer("n_ctx", self.n_ctx, 1)
        if self.ctx is not None and not isinstance(self.ctx, (Tensor, str, os.PathLike)):
            raise TypeError(f"ctx: expected a tensor or the path of a CoOp checkpoint, got {type(self.ctx).__name__}")
        check_choice("precision", self.precision, PRECISIONS)
        check_integer("seed", self.seed, 0, MAX_SEED)
        check_choice("engine", self.engine, ENGINES)
        check_choice("activations", self.activations, ACTIVATIONS)
        check_choice("decoder", self.decoder, DECODERS)
        for name in ("strict_official", "cuda_graphs"):
            if not isinstance(value := getattr(self, name), bool):
                raise TypeError(f"{name}: expected True or False, got {type(value).__name__} {value!r}")
        if self.autocasts and self.engine == "packed":
            raise ValueError("engine: expected 'auto' or 'module' with strict_official and fp16, got 'packed'")
        self.n_selected(self.n_views)

    @property
    def autocasts(self) -> bool:
        """Whether the published code's own precision is asked for."""
        return self.strict_official and self.precision == "fp16"

    def n_selected(self, n_views: int) -> int:
        """How many of ``n_views`` views are kept.

        Raises:
            ValueError: none, and ``strict_official`` (the published code fails there too).
        """
        kept = int(n_views * self.rho)
        if kept == 0 and self.strict_official:
            raise ValueError(f"rho: int({n_views} views * {self.rho}) keeps none, and the published code needs one")
        return max(kept, 1)
