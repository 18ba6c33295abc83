"""The text tower of a model, read once for one precision; class lists are bound to it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from .._checks import check_choice
from .._modes import plain_modes
from ..config import ENGINES
from ..models import read
from ..models.family import Family
from ..models.hugging_face import adapted
from ..models.weights import Unsupported, storage_type
from ..ops._types import accumulation_dtype
from .module import ModuleTower
from .packed import PackedTower
from .prompts import Prompts, Tokenizer, plain_prompts

#: Opaque to callers; holds what ``backward`` needs. Read only, so threads and images may share one.
Tape = Any


class BoundText(Protocol):
    """A tower with the prompts of one class list: forward and backward for one context [n_ctx, W] (class-specific:
    [C, n_ctx, W])."""

    name: str

    @property
    def laid_out(self) -> bool:
        """Whether a second copy of the weights is held, in the layout of our own product."""

    def forward(self, ctx: Tensor, keep: bool) -> tuple[Tensor, Tape | None]:
        """Normalised features [C, D], and with ``keep`` the tape for :meth:`backward`."""

    def backward(self, tape: Tape, grad: Tensor) -> Tensor:
        """d / d ctx, from the gradient of the features [C, D]."""

    def describe(self) -> dict[str, Any]:
        """Sizes and choices, for reports."""

    def weights(self) -> list[Tensor]:
        """What the tower holds."""

    def tensors(self) -> list[Tensor]:
        """What it holds for its class list, beside the tower."""

    def tape_tensors(self, tape: Tape) -> list[Tensor]:
        """What ``tape`` keeps."""


class TextTower:
    """Weights of the text tower, converted once, for any number of class lists. The model itself is left alone.

    Args:
        model: see :class:`~tpt_fast.TextEncoder`.
        precision: "fp32", "fp16", "bf16", or None for the model's own.
        tokenizer: the model's; found from the model when None.
        engine: "auto", "packed" or "module", see :class:`~tpt_fast.TextEncoder`.
        autocast: run the model's own code under fp16 autocast, as the published code does.

    Attributes:
        width, context_length: of its tokens' embeddings, and how many tokens it takes.
        storage: type of the weights and of the rows that flow through the tower.
        dtype: of features and contexts: float32, or float64 for a float64 tower.
        wanted: the engine that was asked for.
        why_module: why the packed tower cannot represent it; None if it can.

    Raises:
        TypeError: a model without a text tower.
        ValueError: an unknown option, or ``engine="packed"`` for a model that it cannot represent exactly.
    """

    def __init__(
        self,
        model: nn.Module | Family,
        precision: str | None = None,
        *,
        tokenizer: Tokenizer | None = None,
        engine: str = "auto",
        autocast: bool = False,
    ) -> None:
        check_choice("engine", engine, ENGINES)
        self._family = family = read(model, tokenizer)
        self.wanted, self._autocast = engine, autocast
        self._embedding = family.embedding
        self.storage = storage_type(precision, family.text)
        self.device, self.width = self._embedding.weight.device, self._embedding.weight.shape[1]
        self.dtype = accumulation_dtype(self.storage)
        self.context_length = family.context_length
        self.tokenizer: Tokenizer = adapted(tokenizer, self.context_length) or family.tokenizer()
        self._packed: PackedTower | None = None
        self.why_module: str | None = "engine='module' was asked for"
        if engine != "module":
            try:
                self._packed, self.why_module = PackedTower(family, self.storage), None
            except Unsupported as reason:
                self._refuse(reason)
                self.why_module = str(reason)

    # --- for copies, perhaps in another process: what is made of the weights is made anew

    def __getstate__(self) -> dict[str, Any]:
        state = vars(self) | {"_packed": None}
        state.pop("_module", None)
        return state

    @plain_modes
    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        if self.why_module is None:
            self._packed = PackedTower(self._family, self.storage)

    @cached_property
    def _module(self) -> ModuleTower:
        return ModuleTower(self._family, self.storage, self._autocast)

    @cached_property
    def digest(self) -> str:
        """What tells models apart, and not the types that hold their weights: SHA-256 of the token embeddings and the
        logit scale, rounded to float16."""
        parts = [self._embedding.weight, getattr(self._family.model, "logit_scale", None)]
        digest = hashlib.sha256()
        for part in parts:
            if isinstance(part, Tensor):
                digest.update(part.detach().half().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()

    @property
    def name(self) -> str:
        """What the model says of itself: its name where it has one, as transformers' do, or else its class."""
        model = self._family.model
        return getattr(model, "name_or_path", None) or type(model).__name__

    @property
    def vocabulary(self) -> int:
        """How many tokens there are."""
        return len(self._embedding.weight)

    def embed(self, ids: Tensor) -> Tensor:
        """Embeddings [..., W] of token ids, as the model makes them."""
        return self._embedding(ids.to(self.device)).detach()

    def encode(self, lists: Iterable[Sequence[str]]) -> Iterator[Tensor]:
        """Normalised features [n, D] of each list of n texts. What the texts of a list begin with is computed once.

        Raises:
            ValueError: a text over the context length.
        """
        for texts in lists:
            _bound, features = self._encode(texts)  # until the next is there, for they share what is laid out for them
            yield features

    @plain_modes
    @torch.no_grad()
    def _encode(self, texts: Sequence[str]) -> tuple[BoundText, Tensor]:
        prompts = plain_prompts(texts, self.tokenizer, self.context_length)
        nothing = torch.empty(0, self.width, dtype=self.dtype, device=self.device)
        bound, _ = self.bind(prompts, nothing, keep=False)
        return bound, bound.forward(nothing, False)[0]

    def bind(self, prompts: Prompts, ctx_init: Tensor, keep: bool) -> tuple[BoundText, str | None]:
        """The tower with one class list, and why it is not the packed one (None if it is).

        Args:
            keep: activations for backward passes, as far as memory allows.
        """
        reason = self.why_module
        if self._packed is not None:
            try:
                return self._packed.bind(prompts, ctx_init, keep), None
            except Unsupported as error:
                self._refuse(error)
                reason = str(error)
        return self._module.bind(prompts, keep), reason

    def _refuse(self, reason: Unsupported) -> None:
        if self.wanted == "packed":
            raise ValueError(f"engine: 'packed' cannot represent this model: {reason}; use 'module'") from reason
