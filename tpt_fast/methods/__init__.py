"""Methods: from the features of an image's views to its answer, one file each.

A method reads features and classes and nothing else, so every method runs in a batch, in a stream, in a CUDA graph and
on features that were kept. One of your own is a :class:`Method` passed as ``method=``::

    class MostConfident(tpt_fast.methods.Method):
        def __call__(self, images, classes, stages):
            logits = classes.logits(classes.scaled(images), classes.text.initial()[0])  # [B, N, C]
            best = logits.softmax(-1).amax(-1).argmax(-1)  # [B]
            chosen = logits[torch.arange(len(best), device=best.device), best]
            return tpt_fast.methods.Answer(chosen, logits[:, 0], extra={"view": best})
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from importlib import import_module
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor

if TYPE_CHECKING:
    from .._stages import Stages
    from ..text.classes import Classes

#: Name -> module and class, imported when asked for.
METHODS = {"tpt": "tpt:Tpt", "official": "official:Official"}


@dataclass
class Answer:
    """What a method says of B images: tensors on their device, which nothing has waited for."""

    logits: Tensor  #: [B, C]
    zero_shot_logits: Tensor  #: [B, C] of view 0 with the initial context
    usable: Tensor | None = None  #: bool [B], False where a number on the way was not finite; None: all are usable
    extra: dict[str, Tensor] = field(default_factory=dict)  #: [B, ...] each: whatever else the method has to tell


class Method:
    """The base of all methods, with what most of them have in common."""

    name: ClassVar[str] = "own"
    online: ClassVar[bool] = False  #: remembers earlier images: their order counts
    loop: ClassVar[str] = "eager"  #: what ``result.engines["loop"]`` says where no CUDA graph is replayed

    def __call__(self, images: Tensor, classes: Classes, stages: Stages) -> Answer:
        """Answer for B images.

        Args:
            images: [B, N, D] features of the views, of length 1, view 0 first; float32 (float64 for float64 towers).
            classes: the class list: its :meth:`~tpt_fast.text.classes.Classes.logits`, and ``text``, its text encoder.
            stages: ``with stages("name")`` times a part of the work for ``result.timings``.
        """
        raise NotImplementedError

    @property
    def capturable(self) -> bool:
        """Whether a CUDA graph may replay it: no value is read on the host, nothing is remembered."""
        return not self.online

    @property
    def keeps_activations(self) -> bool:
        """Whether each image of a batch keeps activations of the text tower of its own."""
        return False

    def check(self, n_views: int) -> None:
        """Raise the ValueError that ``n_views`` views would lead to."""

    def state(self) -> dict[str, Tensor]:
        """What it remembers, for a run that is resumed; empty unless :attr:`online`."""
        return {}


def make_method(name: str, options: Mapping[str, Any], **arguments: Any) -> Method:
    """The method of :data:`METHODS` called ``name``, with those of ``options`` that it has, and ``arguments``."""
    module, _, kind = METHODS[name].partition(":")
    made = getattr(import_module(f".{module}", __name__), kind)
    has = {each.name for each in fields(made)}
    return made(**{key: value for key, value in options.items() if key in has}, **arguments)


def n_selected(n_views: int, rho: float, *, strict: bool = False) -> int:
    """How many of ``n_views`` views are kept: int(N rho), at least one.

    Raises:
        ValueError: none, and ``strict`` (the published code fails there too).
    """
    kept = int(n_views * rho)
    if kept == 0 and strict:
        raise ValueError(f"rho: int({n_views} views * {rho}) keeps none, and the published code needs one")
    return max(kept, 1)
