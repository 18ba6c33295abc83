"""``tune``: one call for one image, over a cache of the last Tuners."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Future
from threading import Lock
from typing import Any, ParamSpec, Protocol, TypeVar, cast

from torch import Tensor, nn
from typing_extensions import Unpack

from .config import TuneConfig, TuneOptions
from .methods.objective import ObjectiveFunction
from .models import read
from .models.module import unwrapped
from .prompting.cocoop import CoCoOp
from .result import TuneResult
from .text.prompts import check_classnames
from .tuner import Tuner
from .views.decode import ImageLike

_KEPT_TUNERS = 4
_tuners: OrderedDict[tuple, Future[Tuner]] = OrderedDict()
_tuners_lock = Lock()  # held to look up and to note down, not while a Tuner is made


P = ParamSpec("P")
R = TypeVar("R", covariant=True)


class _WithCache(Protocol[P, R]):
    def __call__(self, *arguments: P.args, **options: P.kwargs) -> R: ...

    def cache_clear(self) -> None:
        """Let go of the Tuners that are kept, and of their models."""


def _with_cache(function: Callable[P, R]) -> _WithCache[P, R]:
    def cache_clear() -> None:
        with _tuners_lock:
            _tuners.clear()

    function.cache_clear = cache_clear  # type: ignore[attr-defined]
    return cast("_WithCache[P, R]", function)


@_with_cache
def tune(
    model: nn.Module,
    image: ImageLike,
    classnames: Sequence[str],
    *,
    tokenizer: Callable[..., Tensor] | None = None,
    objective: ObjectiveFunction | None = None,
    keep_views: bool = False,
    **options: Unpack[TuneOptions],
) -> TuneResult:
    """Classify ``image`` by CLIP with a prompt tuned for it (test-time prompt tuning, Shu et al., NeurIPS 2022).

    The last four Tuners are kept, and their models with them, so a loop over ``tune`` with the same arguments costs
    no more than a :class:`Tuner`; ``tune.cache_clear()`` lets go of them. Weights and layers that have been
    replaced, and weights changed in place, are noticed and make a new Tuner instead of the old; but not what PyTorch
    does not count: changes through ``.data``, by optimisers with ``fused=True``, and of tensors made in inference
    mode.

    Args:
        model, classnames, tokenizer, objective: see :class:`Tuner`. A new function is another objective, even of
            the same code: define it outside of the loop.
        image, keep_views: see :meth:`Tuner.__call__`.
        options: the fields of :class:`TuneConfig`, and those of the method: ``method="zero", gamma=0.1``.

    Raises:
        TypeError, ValueError: an argument of another type or out of range, or an image that is none.
        OSError: an image file that cannot be read.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a CLIP of open_clip or transformers, got {type(model).__name__}")
    model, names, config = unwrapped(model), check_classnames(classnames), TuneConfig.of(**options)
    return _kept_tuner(model, names, config, tokenizer, objective)(image, keep_views=keep_views)


def _kept_tuner(
    model: nn.Module,
    names: tuple[str, ...],
    config: TuneConfig,
    tokenizer: Callable[..., Tensor] | None,
    objective: ObjectiveFunction | None,
) -> Tuner:
    """A Tuner from the cache; threads that ask for one that is being made wait for it."""
    weights = tuple((w.data_ptr(), w.dtype, _version(w)) for w in (*model.parameters(), *model.buffers()))
    now = (weights, tuple(map(type, model.modules())), read(model, tokenizer).preprocessing)
    how = (id(model), config.precision, config.engine, config.autocasts, _hashable(tokenizer), now)
    chosen = {**vars(config), "ctx": _identity(config.ctx), "objective": objective}
    key = (how, names, *map(_hashable, chosen.values()))
    with _tuners_lock:
        kept = _tuners.get(key)
        made: Future[Tuner] = kept or Future()
        if kept is None:
            for old in [old for old in _tuners if old[0][0] == id(model) and old[0][-1] != now]:
                del _tuners[old]
            clips = [each.result().clip for other, each in _tuners.items() if other[0] == how and _succeeded(each)]
            _tuners[key] = made
            while len(_tuners) > _KEPT_TUNERS:
                _tuners.popitem(last=False)
        _tuners.move_to_end(key)
    if kept is None:
        try:
            if clips:
                made.set_result(Tuner(clips[0], names, config, objective=objective))
            else:
                made.set_result(Tuner(model, names, config, tokenizer=tokenizer, objective=objective))
        except BaseException as error:
            with _tuners_lock:
                _tuners.pop(key, None)
            made.set_exception(error)
    return made.result()


def _succeeded(made: Future[Tuner]) -> bool:
    return made.done() and made.exception() is None


def _hashable(value: Any) -> Hashable:
    try:
        hash(value)
    except TypeError:  # a method or an objective may be so too, and a tuple that holds one
        return id(value)
    return value


def _identity(ctx: Tensor | CoCoOp | str | os.PathLike | None) -> tuple:
    """What changes where the context does."""
    if isinstance(ctx, CoCoOp):
        return id(ctx), *(_version(each) for each in ctx.tensors())
    if isinstance(ctx, Tensor):
        return id(ctx), _version(ctx)
    if ctx is None or not os.path.exists(ctx):
        return (ctx,)
    found = os.stat(ctx)
    return ctx, found.st_ino, found.st_size, found.st_mtime_ns


def _version(tensor: Tensor) -> int:
    """How often ``tensor`` has been changed in place, as far as that is counted."""
    return 0 if tensor.is_inference() else tensor._version
