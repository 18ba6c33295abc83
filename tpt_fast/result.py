"""What classifying one image gives back."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor

from ._fields import described, document
from ._modes import ON_THE_CPU

if TYPE_CHECKING:
    from matplotlib.figure import Figure

T = TypeVar("T")


class Prediction(NamedTuple):
    """One class and its probability."""

    label: str
    index: int  # type: ignore[assignment]  # hides tuple.index, which nobody calls on a prediction
    prob: float


class Extra(Generic[T]):
    """Documents what some methods put into ``TuneResult.extra``, and reads it from there."""

    def __init__(self, meaning: str) -> None:
        self.__doc__ = meaning

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __get__(self, result: TuneResult | None, owner: type) -> T:
        if result is None:
            return self  # type: ignore[return-value]
        if self._name not in result.extra:
            raise AttributeError(self._name)  # TuneResult.__getattr__ says more
        return result.extra[self._name]

    def __set__(self, result: TuneResult, value: T) -> None:
        raise AttributeError(f"{self._name}: a result cannot be changed")


@dataclass(frozen=True, repr=False, eq=False)
class TuneResult:
    """C classes, N views of which K were kept, context of n_ctx vectors (class-specific contexts have C of them, [C,
    n_ctx, width]). Tensors are float32 on the CPU."""

    classnames: tuple[str, ...] = described("the C names as they were given")
    logits: Tensor = described(
        "[C] of the image by the method: view 0 with the tuned context; with the model's logit bias"
    )
    zero_shot_logits: Tensor = described("[C] of view 0 with the initial context")
    ctx_init: Tensor = described("[n_ctx, width], the initial context")
    status: str = described(
        '"tuned"; "skipped", the zero-shot answer, if loss, gradient or answer was not finite; or "failed"'
    )
    method: str = described("name of the method", default="tpt")
    extra: Mapping[str, Any] = described("what the method has to tell besides, by name", factory=dict)
    timings: dict[str, float] = described(
        'seconds of each stage and their "total"; a GPU works on behind them, until "predict"', factory=dict
    )
    engines: dict[str, str] = described(
        "what ran: ops, text tower, image tower (and why not the fast ones), loop, device, order of resampling",
        factory=dict,
    )
    text: dict[str, Any] = described("what the text tower chose: TextEncoder.describe()", factory=dict)
    views: Tensor | None = described("[N, 3, H, W] normalised, kept only if asked for (keep_views=True)", default=None)
    error: BaseException | None = described(
        'why the image could not be read: the status is "failed", and numbers are NaN', default=None
    )
    others: Mapping[str, TuneResult] = described(
        "the results of further methods on the same views, by name; see by_method", factory=dict
    )

    ctx = Extra[Tensor]("[n_ctx, width], tuned")
    grad = Extra[Tensor]("[n_ctx, width] gradient of the last step")
    entropies = Extra[Tensor]("[N] of each view's class probabilities with the initial context, in nats")
    selected = Extra[Tensor](
        "[K] int64, the kept views, ascending in entropy; an own objective does not see this choice"
    )
    loss = Extra[float](
        "marginal entropy of the kept views before the first step; an own objective's value, if there is one"
    )
    loss_after = Extra[float]("the same with the tuned context")
    term = Extra[float]("what the method adds to the entropy, before the first step and its weight")
    shift = Extra[Tensor]("[U, D], tuned, of the U different names; [1, D] if all share it")
    votes = Extra[Tensor]("[C] of the confident views, before a tie is broken")
    view_weights = Extra[Tensor]("[N], how much each view's logits count, of sum 1")
    inlierness = Extra[Tensor]("[N], how much each view belongs to the mode, of sum 1")
    mode = Extra[Tensor]("[D], the mode of the views' features")
    entropy = Extra[float]("of the prediction by which an image enters a cache, in nats")

    doubtful = Extra[float](
        "share of the context's entries whose first gradient is below its own rounding, 0 to 1: AdamW's first step "
        "goes by the sign, which is chance there, in the published code too"
    )

    def __getattr__(self, name: str) -> Any:
        """Whatever the method has put into ``extra``."""
        extra = self.__dict__.get("extra", {})
        if name in extra:
            return extra[name]
        error = self.__dict__.get("error")
        if error is not None and isinstance(vars(TuneResult).get(name), Extra):
            raise ValueError(f"no {name}, the image could not be read: {error}") from error
        if name.startswith("__") or "method" not in self.__dict__:
            raise AttributeError(name)
        raise AttributeError(
            f"a result of method {self.method!r} has no {name!r}; beside its fields it has "
            f"{', '.join(extra) or 'nothing'}"
        )

    @property
    def by_method(self) -> dict[str, TuneResult]:
        """The result of each method that ran on these views, by name: this one first."""
        return {self.method: self, **self.others}

    @property
    def probs(self) -> Tensor:
        """[C] class probabilities by the method."""
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

    def plot(self, path: str | os.PathLike | None = None) -> Figure:
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

    def to_dict(self) -> dict[str, Any]:
        """Tensors, numbers and strings by name, without views: ``torch.save`` writes and ``torch.load`` reads it."""
        known = {
            each.name: getattr(self, each.name)
            for each in fields(self)
            if each.name not in ("views", "extra", "others")
        }
        known["classnames"] = list(self.classnames)
        known["error"] = None if self.error is None else str(self.error)
        if self.error is None:
            known |= {"label": self.label, "index": self.index, "prob": self.topk(1)[0].prob}
        if self.others:
            known["others"] = {name: each.to_dict() for name, each in self.others.items()}
        return known | dict(self.extra)

    def _repr_png_(self) -> bytes | None:
        """The picture, in a notebook, where views were kept and matplotlib is there."""
        if self.views is None or self.error is not None:
            return None
        from .plot import plot, png

        try:
            return png(plot(self))
        except ImportError:
            return None

    def __repr__(self) -> str:
        if self.error is not None:
            return f"TuneResult(failed: {self.error!r})"
        top = ", ".join(f"{p.label} {p.prob:.1%}" for p in self.topk(3))
        said = [f"{self.label!r}: {top}; zero-shot {self.zero_shot_label!r} {self.zero_shot_probs.max():.1%}"]
        if "loss" in self.extra and "loss_after" in self.extra:
            said.append(f"loss {self.loss:.4f} -> {self.loss_after:.4f}")
        if "selected" in self.extra and "entropies" in self.extra:
            said.append(f"{len(self.selected)} of {len(self.entropies)} views kept")
        said += [f"{name} {each.label!r}" for name, each in self.others.items()]
        said.append(f"{self.method} {self.status}, {1e3 * self.timings.get('total', math.nan):.0f} ms")
        return f"TuneResult({'; '.join(said)})"


_EXTRAS = {name: each.__doc__ for name, each in vars(TuneResult).items() if isinstance(each, Extra)}
document(TuneResult, {name: f"{meaning}; if the method has it" for name, meaning in _EXTRAS.items()})


def failed(
    error: BaseException, classnames: tuple[str, ...], ctx_init: Tensor, method: str, engines: dict[str, str]
) -> TuneResult:
    """The result of an image that could not be read."""
    nothing = torch.full((len(classnames),), math.nan, **ON_THE_CPU)
    return TuneResult(
        classnames=classnames,
        logits=nothing,
        zero_shot_logits=nothing.clone(),
        ctx_init=ctx_init,
        status="failed",
        method=method,
        extra={"loss": math.nan, "loss_after": math.nan},
        engines=engines,
        error=error,
    )
