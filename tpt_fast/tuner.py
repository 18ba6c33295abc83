"""Test-time prompt tuning of one image: views, encode, objective, update, predict."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from threading import Lock
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from ._machine import free_bytes
from ._modes import plain_modes
from ._stages import Stages
from .config import TuneConfig
from .extension import load
from .graphs.bundle import Bundle
from .graphs.replay import Graphs
from .memory import Held, Memory, measure
from .methods.tpt import Classes, ObjectiveFunction, Tuned, tune_features
from .models.open_clip import text_root, token_embedding
from .models.preprocessing import preprocessing
from .models.weights import PRECISIONS
from .prompting.coop import load_ctx
from .result import TuneResult, failed
from .stream import stream
from .text import TextEncoder
from .text.prompts import check_classnames
from .views.crops import draw_boxes
from .views.decode import UNREADABLE, load_image
from .views.make import make_views, pass_order
from .vision import ImageEncoder

if TYPE_CHECKING:
    from .methods.official import OfficialLoop

BATCH_BYTES = 2 << 30  # of views and kept activations at once, on the CPU


class Tuner:
    """Tunes prompts of one model for one list of classes; the work that all images share is done here, once.

    The model itself is left alone: the Tuner reads its weights and keeps no mark on it. Weights that change afterwards
    need a new Tuner. Calls from several threads are safe.

    Args:
        model: an open_clip ``CLIP`` or ``CustomTextCLIP`` on any device.
        classnames: C names; ``_`` reads as a space, duplicates are legal.
        config: :class:`TuneConfig`.
        tokenizer: callable ``texts -> int64 [n, context length]``; default: the model's own.
        objective: what to minimise instead of the marginal entropy: a function of the logits [N, C] of all views,
            differentiable by torch, that returns a scalar.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
    """

    @plain_modes
    def __init__(
        self,
        model: nn.Module,
        classnames: Sequence[str],
        config: TuneConfig | None = None,
        *,
        tokenizer: Callable | None = None,
        objective: ObjectiveFunction | None = None,
    ) -> None:
        if config is not None and not isinstance(config, TuneConfig):
            raise TypeError(f"config: expected a TuneConfig, got {type(config).__name__}")
        if objective is not None and not callable(objective):
            raise TypeError(f"objective: expected a function of the logits, got {type(objective).__name__}")
        self.config = config or TuneConfig()
        self.preprocessing = preprocessing(model)
        self._model, self._tokenizer, self._objective = model, tokenizer, objective
        self._backend = load.ensure()
        self._scale = model.logit_scale.detach().float().exp().reshape(())
        bias = getattr(model, "logit_bias", None)  # of models trained by a sigmoid loss
        self._bias = None if bias is None else bias.detach().float().reshape(())
        if self.device.type not in ("cpu", "cuda"):
            raise ValueError(f"model: expected it on the CPU or on CUDA, got it on {self.device}")
        self._official: OfficialLoop | None = None
        if self.config.autocasts:
            if objective is not None:
                raise ValueError("objective: expected None with strict_official and fp16, which has its own")
            from .methods.official import (
                OfficialLoop,  # the plain algorithm's imports are slow, and nothing else needs them
            )

            self._images = ImageEncoder(model, torch.float32, "module")
            self._official = OfficialLoop(self._images, self.device)
        else:
            self._images = ImageEncoder(model, PRECISIONS[self.config.precision])
        self.set_classnames(classnames)

    @plain_modes
    def set_classnames(self, classnames: Sequence[str]) -> None:
        """Tune for another list of classes from now on; calls under way finish with the old one.

        Raises:
            TypeError, ValueError: names or a context that do not fit; the old list stays.
        """
        config, names = self.config, check_classnames(classnames)
        width = token_embedding(text_root(self._model)).weight.shape[1]
        ctx = None if config.ctx is None else load_ctx(config.ctx, width)
        different = list(dict.fromkeys(names))
        if ctx is not None and ctx.dim() == 3:  # class-specific contexts tell equal names apart
            different = list(names)
        text = TextEncoder(
            self._model,
            different,
            config.ctx_init,
            n_ctx=config.n_ctx,
            ctx=ctx,
            seed=config.seed,
            tokenizer=self._tokenizer,
            engine="module" if config.autocasts else config.engine,
            precision="fp32" if config.autocasts else config.precision,
            activations=config.activations,
        )
        if self._official is not None:
            self._official.put_under_autocast(text)
        else:
            text.initial()
        inverse, places = _repeats(names, different, text.device) if len(different) < len(names) else (None, None)
        captures = config.cuda_graphs and self._objective is None and not config.autocasts
        # Autograd runs a module's backward pass on the stream of its forward pass, which is not the capture's.
        captures = captures and text.device.type == "cuda" and text.engine == "packed"
        start = text.ctx_init.float().cpu().clone()
        self._classes = Classes(names, text, start, inverse, places, self._bias, Graphs() if captures else None)

    @property
    def classnames(self) -> tuple[str, ...]:
        """The C names as they were given."""
        return self._classes.names

    @property
    def device(self) -> torch.device:
        """Where the model is, and everything runs."""
        return self._scale.device

    def __call__(self, image, *, boxes: Tensor | None = None, keep_views: bool = False) -> TuneResult:
        """Tune the prompt for ``image`` and classify it.

        Args:
            image: a path, a PIL image, or an array or tensor [H, W, 3] or [3, H, W]; see :func:`load_image`.
            boxes: integers [N - 1, 5], crops (top, left, height, width, flip) to use instead of drawn ones; there are
                N views then, 2 or more, whatever ``n_views`` says.
            keep_views: keep the views in the result, for :meth:`TuneResult.plot`.

        Raises:
            TypeError, ValueError, OSError: an image that cannot be read, naming what is wrong with it.
        """
        return self._tune([self._prepare(image, boxes)], keep_views)[0]

    def tune_batch(self, images: Sequence, *, keep_views: bool = False) -> list[TuneResult]:
        """Tune a prompt of its own for each of B images, in one pass.

        Equal to one image at a time within rounding. What does not fit in a third of the free memory goes in several
        passes of as many images as do; the timings of a result are its pass's, divided by the number of images in it.

        Args:
            images: B images of any sizes, as for :meth:`__call__`.
            keep_views: keep the views in the results.

        Raises:
            TypeError, ValueError, OSError: an image that cannot be read, naming its index, when its pass comes.
        """
        if isinstance(images, (str, Tensor)) or not isinstance(images, Sequence):
            raise TypeError(f"images: expected a list of images, got {type(images).__name__}")
        results, at_once = [], self._at_once()
        for begin in range(0, len(images), at_once):
            prepared = []
            for i, image in enumerate(images[begin : begin + at_once], begin):
                try:
                    prepared.append(self._prepare(image))
                except UNREADABLE as error:
                    *before, message = error.args or ("",)
                    raise type(error)(*before, f"images[{i}]: {message}") from error
            results += self._tune(prepared, keep_views)
        return results

    def map(self, images: Iterable, *, workers: int = 2, keep_views: bool = False) -> Iterator[TuneResult]:
        """Tune for a stream of images, of any length: results one by one, in order, equal to those of single calls.

        While one image is tuned, threads decode the next and make their views, on CUDA on a stream of their own; images
        are taken from ``images`` when there is a place for them, at most ``workers + 1`` ahead. The threads end with
        the stream, and when the generator is closed, forgotten or interrupted. An image that cannot be read gets a
        result with its ``error``, and the stream goes on; any other error ends it. What ``images`` itself raises comes
        after the results before it.

        Args:
            images: yields images as for :meth:`__call__`.
            workers: threads, 1 or more. With ``strict_official`` one: its views are drawn in the order of the images.
            keep_views: keep the views in the results.

        Returns:
            A generator. The stages "load" and "views" of its timings ran while other images were tuned.

        Raises:
            TypeError, ValueError: ``images`` is not iterable, ``workers`` is not an int of 1 or more.
        """
        if isinstance(images, (str, bytes)) or not isinstance(images, Iterable):
            raise TypeError(f"images: expected an iterable of images, got {type(images).__name__}")
        if isinstance(workers, bool) or not isinstance(workers, int):
            raise TypeError(f"workers: expected an int, got {type(workers).__name__}")
        if workers < 1:
            raise ValueError(f"workers: expected 1 or more, got {workers}")
        return stream(self, images, 1 if self.config.strict_official else workers, keep_views)

    def tune_views(self, views: Tensor, *, keep_views: bool = False) -> TuneResult:
        """The same for views that are there already.

        Args:
            views: floating point [N, 3, S, S] on any device, normalised as the model expects; view 0 is classified.

        Raises:
            TypeError, ValueError: another type or shape, fewer than two views, NaN or infinite values.
        """
        size = self.preprocessing.size
        if not isinstance(views, Tensor) or not views.is_floating_point():
            got = views.dtype if isinstance(views, Tensor) else type(views).__name__
            raise TypeError(f"views: expected a floating point tensor [N, 3, {size}, {size}], got {got}")
        if views.dim() != 4 or list(views.shape[1:]) != [3, size, size]:
            raise ValueError(f"views: expected [N, 3, {size}, {size}], got {list(views.shape)}")
        if len(views) < 2:
            raise ValueError(f"views: expected 2 or more views, got {len(views)}")
        if not views.isfinite().all():
            raise ValueError("views: expected finite values, got NaN or infinity")
        return self._tune([Prepared(views.detach().to(self.device), {})], keep_views)[0]

    def memory(self) -> Memory:
        """What this Tuner holds between calls, part by part: bytes of its own, bytes shared with the model, and why.

        In passing a call needs its views and activations of the image tower too; what holds a stream or a batch back
        is said in :meth:`map` and :meth:`tune_batch`.
        """
        text, held = self._classes.text, "fp32" if self.config.autocasts else self.config.precision
        engine, kept = text._engine, text.describe()

        def tower(name: str, weights: object) -> str:
            laid_out = " and, once more, as our own product reads them" if getattr(weights, "laid_out", False) else ""
            return f"weights in {held}{laid_out}, run by {name!r}"

        weights = engine._tower if text.engine == "packed" else engine._module

        memory = measure(
            self._model,
            {
                "image tower": (tower(self._images.engine, self._images._tower), self._images),
                "text tower": (tower(text.engine, weights), weights),
                "kept activations": (
                    f"of the initial prompt, for the first backward pass: {kept['tokens']} tokens",
                    text._initial,
                ),
                "prompts": ("token ids, where they stand, and what of the first block no context touches", text),
                "rest": (
                    "logit scale and bias, which names are equal",
                    (self._scale, self._bias, self._classes.start, self._classes.inverse, self._classes.places),
                ),
            },
        )
        if self._classes.graphs is not None:
            memory["CUDA graphs"] = Held(self._classes.graphs.bytes, 0, "what the captured loops compute in")
        return memory

    def _prepare(self, image, boxes: Tensor | None = None) -> Prepared:
        """From an image to its views."""
        stages = Stages()
        with stages("load"):
            pixels = load_image(image, self.config.decoder, self.device)
        with stages("views"):
            if boxes is None:
                # None stands for torch's global generator, from which the published code draws.
                seed = None if self.config.strict_official else self.config.seed
                boxes = draw_boxes(pixels.shape[0], pixels.shape[1], self.config.n_views - 1, seed=seed)
            views = make_views(
                pixels.to(self.device),
                boxes=boxes,
                dtype=self._images.dtype,
                patch=self._images.patch,
                **self.preprocessing._asdict(),
            )
        if len(views) < 2:
            raise ValueError("boxes: expected one or more crops, got none")
        return Prepared(views, stages.seconds)

    @plain_modes
    @torch.no_grad()
    def _tune(self, prepared: list[Prepared], keep_views: bool) -> list[TuneResult]:
        """One result an image; all have N views."""
        classes, stages = self._classes, Stages()
        for each in prepared:
            stages.add(each.seconds)
        views = prepared[0].views[None] if len(prepared) == 1 else torch.stack([each.views for each in prepared])
        if classes.graphs is None:
            tuned = self._loop(views, classes, stages)
        else:
            with stages("graph"):
                tuned = classes.graphs(lambda given: self._loop(given, classes, Stages()), views)
        with stages("predict"):
            rows = Tuned(*tuned.to_cpu()).rows()
        timings = {name: seconds / len(prepared) for name, seconds in stages.seconds.items()}
        timings["total"] = sum(timings.values())
        return [
            TuneResult(
                classnames=classes.names,
                ctx_init=classes.start.clone(),
                **row,
                timings=dict(timings),
                engines=self._engines(classes),
                text=classes.text.describe(),
                views=self._images.whole(each.views).float().cpu().clone() if keep_views else None,
            )
            for each, row in zip(prepared, rows, strict=True)
        ]

    def _loop(self, views: Tensor, classes: Classes, stages: Stages) -> Bundle:
        """A bundled :class:`Tuned` of B images' views [B, N, ...], without waiting for the device."""
        if self._official is not None:
            return self._official(views, classes, self.config, self._scale, stages).bundle()
        with stages("encode"):
            images = self._scale * self._images.encode(views.flatten(0, 1))
            images = images.view(*views.shape[:2], -1)
        return tune_features(images, classes, self.config, stages, self._objective).bundle()

    def _failed(self, error: BaseException) -> TuneResult:
        """What stands in a stream for an image that could not be read."""
        classes = self._classes
        return failed(error, classes.names, classes.start.clone(), self.config.n_views, self._engines(classes))

    def _at_once(self) -> int:
        """How many images fit in memory together: their views, twice in passing, and what further steps keep."""
        size, text = self.preprocessing.size, self._classes.text
        bytes_each = 2 * self._images.dtype.itemsize * 3 * self.config.n_views * size**2
        if self.config.steps > 1:
            bytes_each += text.describe()["kept_bytes"]
        budget = free_bytes(text.device) // 3
        if text.device.type == "cpu":  # more would gain nothing there
            budget = min(budget, BATCH_BYTES)
        return max(1, budget // bytes_each)

    def _engines(self, classes: Classes) -> dict[str, str]:
        graphs = classes.graphs
        return {
            "ops": self._backend.name,
            "text": classes.text.engine,
            "image": self._images.engine,
            "loop": "published" if self._official else "CUDA graph" if graphs and not graphs.why_eager else "eager",
            "device": str(self.device),
            "resampling": pass_order(),
        }


def _repeats(names: Sequence[str], different: list[str], device: torch.device) -> tuple[Tensor, Tensor]:
    """See :class:`Classes`: which of the different names each of the C is, and where each of them stands."""
    place = {name: i for i, name in enumerate(different)}
    standing: list[list[int]] = [[] for _ in different]
    for i, name in enumerate(names):
        standing[place[name]].append(i)
    most = max(map(len, standing))
    padded = [at + [len(names)] * (most - len(at)) for at in standing]
    return torch.tensor([place[name] for name in names], device=device), torch.tensor(padded, device=device)


class Prepared(NamedTuple):
    """One image's views as the image tower reads them, [N, 3, S, S] or cut into patches, and the seconds of each stage
    that made them."""

    views: Tensor
    seconds: dict[str, float]


_KEPT_TUNERS = 4
_tuners: OrderedDict[tuple, Tuner] = OrderedDict()
_tuners_lock = Lock()


def tune(
    model: nn.Module,
    image,
    classnames: Sequence[str],
    *,
    tokenizer: Callable | None = None,
    objective: ObjectiveFunction | None = None,
    keep_views: bool = False,
    **options,
) -> TuneResult:
    """Classify ``image`` by CLIP with a prompt tuned for it (test-time prompt tuning, Shu et al., NeurIPS 2022).

    The last four Tuners are kept, and their models with them, so a loop over ``tune`` with the same arguments costs no
    more than a :class:`Tuner`; ``tune.cache_clear()`` lets go of them. Weights and layers that have been replaced, and
    weights changed in place, are noticed and make a new Tuner instead of the old; but not what PyTorch does not count:
    changes through ``.data``, by optimisers with ``fused=True``, and of tensors made in inference mode.

    Args:
        model, classnames, tokenizer, objective: see :class:`Tuner`. A new function is another objective, even of the
            same code: define it outside of the loop.
        image, keep_views: see :meth:`Tuner.__call__`.
        options: the fields of :class:`TuneConfig`.

    Raises:
        TypeError, ValueError: an argument of another type or out of range, or an image that is none.
        OSError: an image file that cannot be read.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected an open_clip CLIP or CustomTextCLIP, got {type(model).__name__}")
    names, config = check_classnames(classnames), TuneConfig(**options)
    weights = tuple((w.data_ptr(), w.dtype, _version(w)) for w in (*model.parameters(), *model.buffers()))
    now = (weights, tuple(map(type, model.modules())), preprocessing(model))
    chosen = {**vars(config), "ctx": _identity(config.ctx), "tokenizer": tokenizer, "objective": objective}
    key = (id(model), names, *(value if isinstance(value, Hashable) else id(value) for value in chosen.values()), now)
    with _tuners_lock:
        tuner = _tuners.get(key)
        if tuner is None:
            for old in [old for old in _tuners if old[0] == id(model) and old[-1] != now]:
                del _tuners[old]
            tuner = Tuner(model, names, config, tokenizer=tokenizer, objective=objective)
            _tuners[key] = tuner
            while len(_tuners) > _KEPT_TUNERS:
                _tuners.popitem(last=False)
        _tuners.move_to_end(key)
    return tuner(image, keep_views=keep_views)


def _cache_clear() -> None:
    with _tuners_lock:
        _tuners.clear()


tune.cache_clear = _cache_clear


def _identity(ctx: Tensor | str | os.PathLike | None) -> tuple:
    """What changes where the context does."""
    if isinstance(ctx, Tensor):
        return id(ctx), _version(ctx)
    if ctx is None or not os.path.exists(ctx):
        return (ctx,)
    found = os.stat(ctx)
    return ctx, found.st_ino, found.st_size, found.st_mtime_ns


def _version(tensor: Tensor) -> int:
    """How often ``tensor`` has been changed in place, as far as that is counted."""
    return 0 if tensor.is_inference() else tensor._version
