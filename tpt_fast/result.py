"""What tuning one image gives back."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ._modes import ON_THE_CPU


class Prediction(NamedTuple):
    """One class and its probability."""

    label: str
    index: int
    prob: float


@dataclass(frozen=True, repr=False, eq=False)
class TuneResult:
    """C classes, N views of which K were kept, context of n_ctx vectors (class-specific contexts have C of them, [C,
    n_ctx, width]). Tensors are float32 on the CPU."""

    classnames: tuple[str, ...]
    logits: Tensor  #: [C] of view 0 with the tuned context, with the model's logit bias if it has one
    zero_shot_logits: Tensor  #: [C] of view 0 with the initial context
    ctx_init: Tensor  #: [n_ctx, width]
    ctx: Tensor  #: [n_ctx, width], tuned
    entropies: Tensor  #: [N] of each view's class probabilities with the initial context, in nats
    selected: Tensor  #: [K] int64, the kept views, ascending in entropy; an own objective does not see this choice
    loss: float  #: marginal entropy of the kept views before the first step; an own objective's value, if there is one
    loss_after: float  #: the same with the tuned context
    grad: Tensor  #: [n_ctx, width] gradient of the last step
    status: str  #: "tuned"; "skipped", the zero-shot answer, if loss, gradient or answer was not finite; or "failed"
    #: seconds of each stage; a GPU works on behind them, until "predict"
    timings: dict[str, float] = field(default_factory=dict)
    engines: dict[str, str] = field(default_factory=dict)  #: what ran: ops, text tower, image tower, loop, device, ...
    text: dict[str, Any] = field(default_factory=dict)  #: what the text tower chose: TextEncoder.describe()
    views: Tensor | None = None  #: [N, 3, S, S] normalised, kept only if asked for (``keep_views=True``)
    error: BaseException | None = None  #: why a stream's image could not be read: "failed", and every number is NaN

    @property
    def probs(self) -> Tensor:
        """[C] class probabilities with the tuned context."""
        return self.logits.softmax(-1)

    @property
    def zero_shot_probs(self) -> Tensor:
        """[C] class probabilities with the initial context."""
        return self.zero_shot_logits.softmax(-1)

    @property
    def zero_shot_label(self) -> str:
        """Name of the most probable class with the initial context.

        Raises:
            ValueError: the image could not be read (see ``error``).
        """
        self._check_read()
        return self.classnames[int(self.zero_shot_logits.argsort(descending=True, stable=True)[0])]

    @property
    def index(self) -> int:
        """Index of the most probable class, of equal ones the first; ValueError as for :meth:`topk`."""
        return self.topk(1)[0].index

    @property
    def label(self) -> str:
        """Name of the most probable class; ValueError as for :meth:`topk`."""
        return self.classnames[self.index]

    def topk(self, k: int = 5) -> list[Prediction]:
        """The ``k`` most probable classes (all, if there are fewer), equal ones in the order of their names' list.

        Raises:
            ValueError: ``k`` below 1, or the image could not be read (see ``error``).
        """
        if k < 1:
            raise ValueError(f"k: expected 1 or more, got {k}")
        self._check_read()
        probs = self.probs
        order = self.logits.argsort(dim=-1, descending=True, stable=True)[:k].tolist()
        return [Prediction(self.classnames[i], i, probs[i].item()) for i in order]

    def _check_read(self) -> None:
        if self.error is not None:
            raise ValueError(f"no prediction, the image could not be read: {self.error}") from self.error

    def plot(self, path=None):
        """Draw the views with their entropies, the kept ones framed, and the class probabilities before and after.

        Args:
            path: where to save the picture; the format follows the ending, PNG where there is none.

        Returns:
            The ``matplotlib.figure.Figure``.

        Raises:
            ImportError: matplotlib is missing (``pip install 'tpt_fast[plot]'``).
            ValueError: the result was made without ``keep_views=True``, or an ending that matplotlib does not know.
            OSError: the picture cannot be written.
        """
        from .plot import plot

        return plot(self, path)

    def __repr__(self) -> str:
        if self.error is not None:
            return f"TuneResult(failed: {self.error!r})"
        top = ", ".join(f"{p.label} {p.prob:.1%}" for p in self.topk(3))
        return (
            f"TuneResult({self.label!r}: {top}; zero-shot {self.zero_shot_label!r} {self.zero_shot_probs.max():.1%}; "
            f"loss {self.loss:.4f} -> {self.loss_after:.4f}, {len(self.selected)} of {len(self.entropies)} views kept; "
            f"{self.status}, "
            f"{1e3 * self.timings.get('total', float('nan')):.0f} ms)"
        )


def failed(
    error: BaseException, classnames: tuple[str, ...], ctx_init: Tensor, n_views: int, engines: dict[str, str]
) -> TuneResult:
    """The result of an image that could not be read."""
    nan = float("nan")
    nothing = torch.full((len(classnames),), nan, **ON_THE_CPU)
    return TuneResult(
        classnames=classnames,
        logits=nothing,
        zero_shot_logits=nothing.clone(),
        ctx_init=ctx_init,
        ctx=torch.full_like(ctx_init, nan),
        entropies=torch.full((n_views,), nan, **ON_THE_CPU),
        selected=torch.empty(0, dtype=torch.int64, device="cpu"),
        loss=nan,
        loss_after=nan,
        grad=torch.full_like(ctx_init, nan),
        status="failed",
        engines=engines,
        error=error,
    )
