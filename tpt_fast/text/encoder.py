"""``TextEncoder``: the text features of a class list as a function of the context."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .._checks import check_choice
from .._locks import Lock
from .._modes import ON_THE_CPU, plain_modes
from ..config import ACTIVATIONS
from ..prompting.coop import load_ctx
from ..prompting.saved import check_header
from .jacobian import Jacobian, Track
from .prompts import Tokenizer, build_prompts, check_classnames
from .tower import Tape, TextTower


class TextEncoder:
    """Text features of all classes, as a function of the context vectors that precede (or surround) the names.

    The model is never changed, and one encoder may be used from several threads. Weights are read when it is made: make
    a new one after changing them.

    Args:
        model: one that :class:`~tpt_fast.clip.Clip` reads, on any device; or a :class:`TextTower`, whose weights
            several encoders share, with its tokenizer, engine and precision.
        classnames: C names, duplicates allowed; underscores are read as spaces.
        ctx_init: initial words. "[CLS]" in it puts the name there: words after it are context too ("middle", "front").
        n_ctx: this many random context vectors (normal, std 0.02, from ``seed``) in place of the words' embeddings.
        ctx: initial context [n_ctx, width] (class-specific, CoOp's CSC: [C, n_ctx, width]), or the path of a
            CoOp checkpoint.
        seed: of the random context.
        tokenizer: the model's, as its library makes it; found from the model when None.
        engine: "packed" computes what the classes share once; "module" runs the model's own code on prompts cut to the
            longest EOT; "auto" takes "packed" where it represents the model exactly.
        precision: storage type of the tower, "fp32", "fp16", "bf16", or None for the model's own.
        activations: "keep" those of a forward that will be followed by a backward, as far as memory allows, or
            "recompute" them.

    Attributes:
        classnames: tuple of the C names.
        ctx_init: initial context, float32 (float64 for a float64 model) [n_ctx, width] or [C, n_ctx, width].
        tower: the :class:`TextTower`.
        engine: "packed" or "module", the one that runs; ``why_module`` says why it is not the packed one.

    Raises:
        TypeError: a model without a text tower; names that are not strings.
        ValueError: no names, a name over the context length, a bad context, an unknown option, or ``engine="packed"``
            for a model that the packed engine cannot represent exactly.
    """

    @plain_modes
    def __init__(
        self,
        model: nn.Module | TextTower,
        classnames: Sequence[str],
        ctx_init: str = "a photo of a",
        *,
        n_ctx: int | None = None,
        ctx: Tensor | str | os.PathLike | None = None,
        seed: int = 0,
        tokenizer: Tokenizer | None = None,
        engine: str = "auto",
        precision: str | None = None,
        activations: str = "keep",
    ) -> None:
        check_choice("activations", activations, ACTIVATIONS)
        if isinstance(model, TextTower):
            if (tokenizer, engine, precision) != (None, "auto", None):
                raise ValueError("tokenizer, engine, precision: expected none of them with a tower, which has its own")
            tower = model
        else:
            tower = TextTower(model, precision, tokenizer=tokenizer, engine=engine)
        self.classnames, self.tower = check_classnames(classnames), tower
        self.dtype, self.device, self.storage = tower.dtype, tower.device, tower.storage

        check_header(ctx, tower, ctx_init, self.classnames)
        given = None if ctx is None else load_ctx(ctx, tower.width)
        if given is not None:
            if given.ndim == 3 and len(given) != len(self.classnames):
                raise ValueError(
                    f"ctx: expected one context for each of {len(self.classnames)} classes, got {len(given)}"
                )
            if n_ctx not in (None, given.shape[-2]):
                raise ValueError(
                    f"n_ctx: expected {given.shape[-2]} (the given ctx has as many vectors) or None, got {n_ctx}"
                )
            n_ctx = given.shape[-2]
        self.prompts = build_prompts(self.classnames, ctx_init, n_ctx, tower.tokenizer, tower.context_length)
        if given is None and n_ctx is not None:
            noise = torch.Generator().manual_seed(seed)
            given = 0.02 * torch.randn(n_ctx, tower.width, generator=noise, **ON_THE_CPU)
        elif given is None:
            given = tower.embed(self.prompts.ids[0, self.prompts.positions[0]])
        self.ctx_init = given.to(self.device, self.dtype, copy=True)  # the caller may go on changing what was given

        self._keep = activations == "keep"
        self._bound, self.why_module = tower.bind(self.prompts, self.ctx_init, self._keep)
        self._initial: tuple[Tensor, Tape | Jacobian] | None = None
        self._lock = Lock()

    # --- for copies, perhaps in another process: what is laid out for the class list is made anew

    def __getstate__(self) -> dict[str, Any]:
        jacobian = self._initial is not None and isinstance(self._initial[1], Jacobian)
        return vars(self) | {"_bound": None, "_initial": self._initial if jacobian else None}

    @plain_modes
    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._bound, self.why_module = self.tower.bind(self.prompts, self.ctx_init, self._keep)

    @property
    def engine(self) -> str:
        return self._bound.name

    @property
    def laid_out(self) -> bool:
        """Whether a second copy of the weights is held, in the layout of our own product."""
        return self._bound.laid_out

    def weights(self) -> list[Tensor]:
        """What the tower holds, which several encoders may share."""
        return self._bound.weights()

    def kept(self) -> list[Tensor]:
        """Activations of the initial context, for the first backward pass."""
        if self._initial is None:
            return []
        features, tape = self._initial
        return [features, *([tape.rows] if isinstance(tape, Jacobian) else self._bound.tape_tensors(tape))]

    def tensors(self) -> list[Tensor]:
        """What this encoder holds beside :meth:`weights` and :meth:`kept`."""
        ids = (self.prompts.ids, self.prompts.lengths, self.prompts.positions)
        return [*ids, self.ctx_init, *self._bound.tensors()]

    # --- for training prompts with autograd

    def encode(self, ctx: Tensor) -> Tensor:
        """Normalised features [C, D] of ``ctx`` [n_ctx, W], or [B, C, D] of [B, n_ctx, W], differentiable once.

        A class-specific encoder takes [C, n_ctx, W] or [B, C, n_ctx, W]. Features are float32 (float64 for float64).

        Raises:
            TypeError, ValueError: a context of another type or shape.
        """
        self._check_ctx(ctx)
        return _Encode.apply(ctx.to(self.device, self.dtype), self)

    # --- for the Tuner: no graph, activations shared between images

    def initial(self) -> tuple[Tensor, Tape | Jacobian]:
        """Features [C, D] of :attr:`ctx_init` and their tape, computed once and shared by every image and thread."""
        with self._lock:
            if self._initial is None:
                self._initial = self.forward(self.ctx_init, keep=True)
        return self._initial

    @plain_modes
    @torch.no_grad()
    def keep_jacobian(self, track: Track = iter) -> None:
        """Replace the tape of :meth:`initial` by a :class:`~tpt_fast.text.jacobian.Jacobian`: backward passes from
        there become a matrix product, whose sums are rounded in another order.

        Args:
            track: passes on the D steps that it takes, as progress bars do.

        Raises:
            ValueError: it does not fit in memory.
        """
        features, _ = self.initial()
        each = self.ctx_init if self.ctx_init.ndim == 3 else self.ctx_init.expand(len(features), *self.ctx_init.shape)
        bound, _ = self.tower.bind(self.prompts, each, True)
        self._initial = features, Jacobian.make(bound, features, self.ctx_init, each.contiguous(), track)

    @plain_modes
    @torch.no_grad()
    def forward(self, ctx: Tensor, keep: bool = False) -> tuple[Tensor, Tape | None]:
        """Features of ``ctx`` as :meth:`encode` gives them, without a graph, and with ``keep`` their tape."""
        self._check_ctx(ctx)
        ctx = ctx.detach().to(self.device, self.dtype)
        if ctx.ndim == self.ctx_init.ndim:
            return self._bound.forward(ctx, keep)
        results = [self._bound.forward(one, keep) for one in ctx]
        return torch.stack([features for features, _ in results]), [tape for _, tape in results] if keep else None

    @plain_modes
    @torch.no_grad()
    def backward(self, tape: Tape | Jacobian, grad_features: Tensor) -> Tensor:
        """Gradient with respect to the context of ``tape``, from that of its features.

        Args:
            tape: of :meth:`forward` or :meth:`initial`; it stays valid and unchanged.
            grad_features: [C, D] or [B, C, D]. A tape of one context serves B gradients too: B images that start from
                the same prompt.

        Returns:
            [n_ctx, W] or [B, n_ctx, W] in the type of :attr:`ctx_init`.
        """
        if isinstance(tape, Jacobian):
            return tape.backward(grad_features.to(self.dtype))
        if grad_features.ndim == 2:
            return self._bound.backward(tape, grad_features)
        tapes = tape if isinstance(tape, list) else [tape] * len(grad_features)
        return torch.stack([self._bound.backward(one, grad) for one, grad in zip(tapes, grad_features, strict=True)])

    def describe(self) -> dict[str, Any]:
        """Engine, tokens before and after packing, classes at once, and what a kept forward holds in memory."""
        return {
            "engine": self.engine,
            "why_module": self.why_module,
            "classes": len(self.classnames),
            "n_ctx": self.prompts.n_ctx,
            "tokens_before": self.prompts.ids.numel(),
            **self._bound.describe(),
        }

    def _check_ctx(self, ctx: Tensor) -> None:
        expected = list(self.ctx_init.shape)
        if not isinstance(ctx, Tensor) or not ctx.is_floating_point():
            raise TypeError(f"ctx: expected a floating point tensor, got {getattr(ctx, 'dtype', type(ctx).__name__)}")
        if list(ctx.shape[-len(expected) :]) != expected or ctx.ndim > len(expected) + 1 or 0 in ctx.shape:
            raise ValueError(f"ctx: expected {expected} or [B, {str(expected)[1:]}, got {list(ctx.shape)}")


class StartedText:
    """A :class:`TextEncoder` of B images, each of which starts from a context of its own.

    Args:
        ctx_init: [B, n_ctx, W].
        keep: whether a backward pass from these contexts will come.
    """

    def __init__(self, text: TextEncoder, ctx_init: Tensor, keep: bool) -> None:
        self._text, self._keep, self.ctx_init = text, keep, ctx_init.to(text.dtype)
        self._found: tuple[Tensor, Tape | None] | None = None

    def initial(self) -> tuple[Tensor, Any]:
        """Features [B, C, D] and their tapes, computed at the first call."""
        if self._found is None:
            self._found = self._text.forward(self.ctx_init, self._keep)
        return self._found

    def __getattr__(self, name: str) -> Any:
        return getattr(self._text, name)


class _Encode(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, context: Tensor, encoder: TextEncoder) -> Tensor:
        features, tape = encoder.forward(context, keep=ctx.needs_input_grad[0])
        ctx.encoder, ctx.tape = encoder, tape
        return features

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.encoder.backward(ctx.tape, grad), None
