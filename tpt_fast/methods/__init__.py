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
from dataclasses import Field, dataclass, field, fields, is_dataclass
from difflib import get_close_matches
from importlib import import_module
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor

if TYPE_CHECKING:
    from .._stages import Stages
    from ..text.classes import Classes

#: Name -> module and class, imported when asked for; ``tpt_fast.methods.Zero`` is such a class too.
METHODS = {
    "tpt": "tpt:Tpt",
    "official": "official:Official",
    "ctpt": "ctpt:Ctpt",
    "otpt": "otpt:Otpt",
    "rtpt": "rtpt:Rtpt",
    "tps": "tps:Tps",
    "zero": "zero:Zero",
    "mta": "mta:Mta",
    "tda": "tda:Tda",
    "ensemble": "ensemble:Ensemble",
    "zero_shot": "zero_shot:ZeroShot",
}

#: Options of a method that are options of :class:`tpt_fast.TuneConfig` too.
SHARED = ("rho", "steps", "lr", "weight_decay")


@dataclass
class Answer:
    """What a method says of B images: tensors on their device, which nothing has waited for."""

    logits: Tensor  #: [B, C]
    zero_shot_logits: Tensor  #: [B, C] of view 0 with the initial context
    usable: Tensor | None = None  #: bool [B], False where a number on the way was not finite; None: all are usable
    extra: dict[str, Tensor] = field(default_factory=dict)  #: [B, ...] each: whatever else the method has to tell
    others: dict[str, Answer] = field(default_factory=dict)  #: what further methods say, by name


class Method:
    """The base of all methods, with what most of them have in common."""

    name: ClassVar[str] = "own"
    paper: ClassVar[str] = ""
    tunes: ClassVar[str] = ""  #: what changes for an image
    gradient: ClassVar[str] = "through the text tower"  #: or "of the class vectors" or "none": what it needs
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

    def check_shards(self, shards: int) -> None:
        """Raise a ValueError if the images may not be shared out among ``shards`` processes."""
        if self.online and shards > 1:
            raise ValueError(
                f"shards: expected 1 with method {self.name!r}, which learns from each image, got {shards}"
            )

    def prepare(self, classes: Classes) -> None:
        """Make what can be made once for a class list (:meth:`~tpt_fast.text.classes.Classes.once`), or raise the
        ValueError that it would lead to."""

    def state(self) -> dict[str, Tensor]:
        """What it remembers, for a run that is resumed; empty unless :attr:`online`."""
        return {}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Go on from what :meth:`state` has given.

        Raises:
            ValueError: the state of something else.
        """
        if state:
            raise ValueError(f"state: expected nothing, which method {self.name!r} remembers, got {', '.join(state)}")


def method_class(name: str) -> type[Method]:
    """The class of :data:`METHODS` called ``name``.

    Raises:
        ValueError: there is none; which is meant, perhaps.
    """
    if name not in METHODS:
        close = get_close_matches(name, METHODS, 1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"method: expected one of {', '.join(METHODS)}, got {name!r}{hint}")
    module, _, kind = METHODS[name].partition(":")
    return getattr(import_module(f".{module}", __name__), kind)


def method_options(of: Method | type[Method]) -> dict[str, Field]:
    """The options of a method, by name: those of its fields that say what they mean."""
    return {each.name: each for each in fields(of) if "help" in each.metadata} if is_dataclass(of) else {}


def make_method(name: str, options: Mapping[str, Any], **arguments: Any) -> Method:
    """The method of :data:`METHODS` called ``name``, with those of ``options`` that it has, and ``arguments``."""
    made = method_class(name)
    has = method_options(made)
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


_CLASSES = dict(each.partition(":")[::2][::-1] for each in METHODS.values())  # class -> module


def __getattr__(name: str) -> Any:
    if name not in _CLASSES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_CLASSES[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_CLASSES})
