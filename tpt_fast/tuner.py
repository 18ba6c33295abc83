"""Images in, results out: prepare, encode, method, result."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ._checks import check_integer
from ._machine import free_bytes
from ._modes import plain_modes
from ._stages import Stages
from .clip import Clip
from .config import TuneConfig
from .extension import load
from .graphs.bundle import Bundle
from .graphs.replay import Graphs
from .memory import Memory, Size, measure
from .methods import Answer, Method
from .methods.objective import ObjectiveFunction, check_objective
from .methods.tpt import Tpt
from .models.preprocessing import Preprocessing
from .prompting.cocoop import CoCoOp, load_start
from .prompting.saved import check_header
from .result import TuneResult, failed
from .stream import Prepared, Steps, stream
from .text import TextEncoder
from .text.classes import Classes
from .text.jacobian import Track
from .text.prompts import check_classnames
from .views.crops import draw_boxes
from .views.decode import UNREADABLE, ImageLike, load_image
from .views.make import make_views, pass_order

BATCH_BYTES = 2 << 30  # of views and kept activations at once, on the CPU


class _Loop(NamedTuple):
    """What one class list runs: replaced whole, so calls under way finish with the old one."""

    classes: Classes
    start: Tensor  # the initial context, float32 on the CPU
    graphs: Graphs | None  # of the loop, where it is captured


class _Loaded(NamedTuple):
    """One image's pixels, and the stages that it has been through."""

    pixels: Tensor  # uint8 [H, W, 3]
    stages: Stages


class Tuner:
    """Tunes prompts of one model for one list of classes; the work that all images share is done here, once.

    The model itself is left alone: the Tuner reads its weights and keeps no mark on it. Weights that change afterwards
    need a new Tuner. Calls from several threads are safe.

    Args:
        model: one that :class:`~tpt_fast.clip.Clip` reads; or a ``Clip``, whose weights several Tuners share
            (``Tuner(tuner.clip, other_names)``).
        classnames: C names; ``_`` reads as a space, duplicates are legal.
        config: :class:`TuneConfig`.
        tokenizer: see :class:`~tpt_fast.clip.Clip`; default: the model's own.
        objective: what to minimise instead of the marginal entropy, differentiable by torch: a function
            ``(logits)``, ``(logits, text_features)`` or ``(logits, text_features, image_features)`` of one image that
            returns a scalar. Logits [N, C] of all views, class features [C, D] and features of the views [N, D], both
            of length 1. A loss that depends on other tensors with a gradient is refused.

    Attributes:
        clip: the model as it was read; config: as given.
        method: the :class:`~tpt_fast.methods.Method` that runs.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
    """

    @plain_modes
    def __init__(
        self,
        model: nn.Module | Clip,
        classnames: Sequence[str],
        config: TuneConfig | None = None,
        *,
        tokenizer: Callable[..., Tensor] | None = None,
        objective: ObjectiveFunction | None = None,
    ) -> None:
        if config is not None and not isinstance(config, TuneConfig):
            raise TypeError(f"config: expected a TuneConfig, got {type(config).__name__}")
        if objective is not None:
            check_objective(objective)
        self.config = config or TuneConfig()
        self.method = _method(self.config, objective)
        self.clip = Clip.of(model, self.config, tokenizer)
        self._backend = load.ensure(self.device)
        self.set_classnames(classnames)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A copy, perhaps in another process."""
        vars(self).update(state)
        self._backend = load.ensure(self.device)

    @plain_modes
    def set_classnames(self, classnames: Sequence[str]) -> None:
        """Tune for another list of classes from now on; calls under way finish with the old one.

        Raises:
            TypeError, ValueError: names or a context that do not fit; the old list stays.
        """
        config, clip, names = self.config, self.clip, check_classnames(classnames)
        ctx = start = None
        check_header(config.ctx, clip.text, config.ctx_init, names)
        if config.ctx is not None:  # the published code feeds CoCoOp's net the feature as the tower gives it
            ctx = load_start(config.ctx, clip.text.width, normalised=not config.strict_official)
        if isinstance(ctx, CoCoOp):
            if self.method.online:
                raise ValueError(f"ctx: expected one for all images with method {self.method.name!r}, got CoCoOp's")
            start, ctx = ctx, ctx.ctx
        different = list(dict.fromkeys(names))
        if ctx is not None and ctx.dim() == 3:  # class-specific contexts tell equal names apart
            different = list(names)
        text = TextEncoder(
            clip.text,
            different,
            config.ctx_init,
            n_ctx=config.n_ctx,
            ctx=ctx,
            seed=config.seed,
            activations=config.activations if self.method.gradient == Method.gradient else "recompute",
        )
        if not clip.autocast:
            text.initial()
        classes = Classes.of(names, text, clip.scale, clip.bias)
        if start is not None:
            width, wanted = text.initial()[0].shape[-1], start.weight1.shape[1]
            if width != wanted:
                raise ValueError(
                    f"ctx: CoCoOp's net expects image features of width {wanted}; the model's have {width}"
                )
            classes = replace(classes, start=start.to(text.ctx_init))
        with torch.no_grad():
            self.method.prepare(classes)
        # Autograd runs a module's backward pass on the stream of its forward pass, which is not the capture's.
        captures = self.device.type == "cuda" and text.engine == "packed"
        captures = captures and config.cuda_graphs and self.method.capturable
        self._loop = _Loop(classes, text.ctx_init.float().cpu().clone(), Graphs() if captures else None)

    @property
    def classnames(self) -> tuple[str, ...]:
        """The C names as they were given."""
        return self._loop.classes.names

    @property
    def classes(self) -> Classes:
        """The class list as methods see it."""
        return self._loop.classes

    @property
    def graphs(self) -> Graphs | None:
        """The CUDA graphs of the loop; None where it is not captured."""
        return self._loop.graphs

    @property
    def device(self) -> torch.device:
        """Where the model is, and everything runs."""
        return self.clip.device

    @property
    def preprocessing(self) -> Preprocessing:
        """How the model's images are prepared."""
        return self.clip.preprocessing

    def __call__(self, image: ImageLike, *, boxes: Tensor | None = None, keep_views: bool = False) -> TuneResult:
        """Tune the prompt for ``image`` and classify it.

        Args:
            image: a path, a PIL image, or an array or tensor [H, W, 3] or [3, H, W]; see :func:`load_image`.
            boxes: integers [N - 1, 5], crops (top, left, height, width, flip) to use instead of drawn ones; there are
                N views then, 2 or more, whatever ``n_views`` says.
            keep_views: keep the views in the result, for :meth:`TuneResult.plot`.

        Raises:
            TypeError, ValueError, OSError: an image that cannot be read, naming what is wrong with it.
        """
        return self.finish([self.prepare(image, boxes)], keep_views=keep_views)[0]

    def tune_batch(self, images: Sequence[ImageLike], *, keep_views: bool = False) -> list[TuneResult]:
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
                    prepared.append(self.prepare(image))
                except UNREADABLE as error:
                    *before, message = error.args or ("",)
                    raise type(error)(*before, f"images[{i}]: {message}") from error
            results += self.finish(prepared, keep_views=keep_views)
        return results

    def map(
        self, images: Iterable[ImageLike], *, workers: int = 2, keep_views: bool = False
    ) -> Generator[TuneResult, None, None]:
        """Tune for a stream of images, of any length: results one by one, in order, equal to those of single calls.

        While one image is tuned, threads decode the next ones. On CUDA they also make their views, on a stream of their
        own; on a CPU, whose cores the towers fill, that would only take time from them. Images are taken from
        ``images`` when there is a place for them, at most ``workers + 1`` ahead. The threads end with the stream, and
        when the generator is closed, forgotten or interrupted. An image that cannot be read gets a result with its
        ``error``, and the stream goes on; any other error ends it. What ``images`` itself raises comes after the
        results before it.

        Args:
            images: yields images as for :meth:`__call__`.
            workers: threads, 1 or more. With ``strict_official`` one: its views are drawn in the order of the images.
            keep_views: keep the views in the results.

        Returns:
            A generator. The stages "load" and "views" of its timings ran while other images were tuned.

        Raises:
            TypeError, ValueError: ``images`` is not iterable or yields (image, label) pairs; ``workers`` is no int of 1
                or more.
        """
        if isinstance(images, (str, bytes)) or not isinstance(images, Iterable):
            raise TypeError(f"images: expected an iterable of images, got {type(images).__name__}")
        check_integer("workers", workers, 1)
        steps: Steps[Any, TuneResult] = Steps(
            ahead=self.prepare if self.device.type == "cuda" else self._load,
            prepare=(lambda prepared: prepared) if self.device.type == "cuda" else self._cut,
            finish=lambda prepared: self.finish([prepared], keep_views=keep_views)[0],
            fail=self.failed,
        )
        return stream(steps, images, self.device, 1 if self.config.strict_official else workers)

    def tune_views(self, views: Tensor, *, keep_views: bool = False) -> TuneResult:
        """The same for views that are there already.

        Args:
            views: floating point [N, 3, H, W] on any device, normalised as the model expects; view 0 is classified.

        Raises:
            TypeError, ValueError: another type or shape, fewer than two views, NaN or infinite values.
        """
        height, width = self.clip.preprocessing.sides
        if not isinstance(views, Tensor) or not views.is_floating_point():
            got = views.dtype if isinstance(views, Tensor) else type(views).__name__
            raise TypeError(f"views: expected a floating point tensor [N, 3, {height}, {width}], got {got}")
        if views.dim() != 4 or list(views.shape[1:]) != [3, height, width]:
            raise ValueError(f"views: expected [N, 3, {height}, {width}], got {list(views.shape)}")
        if len(views) < 2:
            raise ValueError(f"views: expected 2 or more views, got {len(views)}")
        if not views.isfinite().all():
            raise ValueError("views: expected finite values, got NaN or infinity")
        return self.finish([Prepared(views.detach().to(self.device), {})], keep_views=keep_views)[0]

    def tune_features(self, features: Tensor) -> TuneResult | list[TuneResult]:
        """The same for features that are there already, of :meth:`encode`: the image tower is not asked.

        Args:
            features: floating point [N, D], or [B, N, D] for B images, on any device; view 0 first.

        Returns:
            One result, or a list of B.

        Raises:
            TypeError, ValueError: another type or shape, fewer than two views, NaN or infinite values.
        """
        if not isinstance(features, Tensor) or not features.is_floating_point():
            got = features.dtype if isinstance(features, Tensor) else type(features).__name__
            raise TypeError(f"features: expected a floating point tensor [N, D] or [B, N, D], got {got}")
        width = self._loop.classes.text.initial()[0].shape[-1]
        if features.dim() not in (2, 3) or features.shape[-1] != width or features.shape[-2] < 2:
            raise ValueError(
                f"features: expected [N, {width}] or [B, N, {width}] of 2 or more views, got {list(features.shape)}"
            )
        if not features.isfinite().all():
            raise ValueError("features: expected finite values, got NaN or infinity")
        start = self._loop.classes.start
        if start is not None and not start.normalised:
            raise ValueError(
                "features: expected views in their place, for this CoCoOp's net reads the features' lengths; "
                "CoCoOp.load(path, normalised=True) is as it was trained"
            )
        batch = features.detach().to(self.device, self.clip.text.dtype)
        results = self._results(self._loop, batch if features.dim() == 3 else batch[None], Stages(), encoded=True)
        return results if features.dim() == 3 else results[0]

    def keep_jacobian(self, track: Track = iter) -> None:
        """Make the first backward pass of every image one matrix product, for this class list, as long as it stays.

        The gradient at the initial context is linear in that of the class features; what it is linear by, 4 C D n_ctx W
        bytes (4.2 GB for 1000 classes of ViT-B/16), is made by D backward passes, each some 1.6 times as long as an
        image's. An image with one step then needs half of the text tower's work, so it is for thousands of images on
        features that were kept, best in batches (:meth:`tune_features`), for which it is read once.

        Args:
            track: passes on the D steps, as progress bars do: ``tuner.keep_jacobian(tqdm.tqdm)``.

        Raises:
            ValueError: it does not fit in memory, or the method or the context has no use for it.
        """
        loop = self._loop
        if self.method.gradient != Method.gradient or loop.classes.start is not None or self.clip.autocast:
            why = (
                "each image starts from a context of its own" if loop.classes.start else "no gradient goes to a context"
            )
            raise ValueError(f"method: expected one whose images share their first backward pass; {why}")
        loop.classes.text.keep_jacobian(track)
        self._loop = loop._replace(graphs=None if loop.graphs is None else Graphs())

    def memory(self) -> Memory:
        """What this Tuner holds between calls, part by part: bytes of its own, bytes shared with the model, and why.

        The temporary memory of a call is not counted: its views, and the activations of the image tower. What a stream
        or a batch holds is said in :meth:`map` and :meth:`tune_batch`.
        """
        clip, classes, graphs = self.clip, self._loop.classes, self._loop.graphs
        text, held = classes.text, "fp32" if clip.autocast else clip.precision

        def tower(of: Any) -> str:
            laid_out = " and, once more, as our own product reads them" if of.laid_out else ""
            return f"weights in {held}{laid_out}, run by {of.engine!r}"

        kept = f"of the initial prompt, for the first backward pass: {text.describe()['tokens']} tokens"
        scalars = [each for each in (clip.scale, clip.bias, self._loop.start) if each is not None]
        memory = measure(
            clip.model,
            {
                "image tower": (tower(clip.image), clip.image.tensors()),
                "text tower": (tower(text), text.weights()),
                "kept activations": (kept, text.kept()),
                "prompts": (
                    "token ids, where they stand, and what of the first block no context touches",
                    text.tensors(),
                ),
                "rest": ("logit scale and bias, which names are equal", [*scalars, *classes.tensors()]),
            },
        )
        if graphs is not None:
            memory["CUDA graphs"] = Size(graphs.bytes, 0, "what the captured loops compute in")
        return memory

    # --- the steps of a call, for pipelines of one's own

    def prepare(self, image: ImageLike, boxes: Tensor | None = None, *, seed: int | None = None) -> Prepared:
        """From an image, as :meth:`__call__` takes it, to its views; safe to call from other threads.

        Args:
            seed: of this image's views, in place of the configuration's.
        """
        return self._cut(self._load(image), boxes, seed)

    def _load(self, image: ImageLike) -> _Loaded:
        stages = Stages()
        with stages("load"):
            pixels = load_image(image, self.config.decoder, self.device)
        return _Loaded(pixels, stages)

    def _cut(self, loaded: _Loaded, boxes: Tensor | None = None, seed: int | None = None) -> Prepared:
        pixels, stages = loaded
        with stages("views"):
            # None stands for the global generators of torch and NumPy, from which the published code draws.
            if seed is None and not self.config.strict_official:
                seed = self.config.seed
            if boxes is None:
                boxes = draw_boxes(pixels.shape[0], pixels.shape[1], self.config.n_views - 1, seed=seed)
            views = make_views(
                pixels.to(self.device),
                seed=seed,
                boxes=boxes,
                views=self.config.views,
                dtype=self.clip.image.dtype,
                patch=self.clip.image.patch,
                **self.clip.preprocessing._asdict(),
            )
        if len(views) < 2:
            raise ValueError("boxes: expected one or more crops, got none")
        return Prepared(views, stages.seconds)

    @plain_modes
    @torch.no_grad()
    def encode(self, prepared: Prepared) -> Tensor:
        """Features [N, D] of an image's views, of length 1, which :meth:`tune_features` takes."""
        return self.clip.encode(prepared.views[None])[0]

    def finish(self, prepared: Sequence[Prepared], *, keep_views: bool = False) -> list[TuneResult]:
        """From the views of images, N of each, to a result of each."""
        loop, stages = self._loop, Stages()
        for each in prepared:
            stages.add(each.seconds)
        views = prepared[0].views[None] if len(prepared) == 1 else torch.stack([each.views for each in prepared])
        kept = [each.views for each in prepared] if keep_views else None
        return self._results(loop, views, stages, views=kept)

    def failed(self, error: BaseException) -> TuneResult:
        """The result of an image that could not be read, as streams have it."""
        loop = self._loop
        names = [self.method.name, *getattr(self.method, "others", ())]
        first, *others = (
            failed(error, loop.classes.names, loop.start.clone(), name, self._engines(loop)) for name in names
        )
        return replace(first, others={each.method: each for each in others})

    @plain_modes
    @torch.no_grad()
    def _results(
        self, loop: _Loop, given: Tensor, stages: Stages, *, encoded: bool = False, views: list[Tensor] | None = None
    ) -> list[TuneResult]:
        """One result an image, of views [B, N, ...], or of features [B, N, D] where they are ``encoded``."""

        def run(given: Tensor, stages: Stages = stages) -> Bundle:
            return self.run(loop.classes, given, stages, encoded=encoded)

        self.method.check(given.shape[1])
        if loop.graphs is None:
            bundle = run(given)
        else:
            with stages("graph"):
                bundle = loop.graphs(lambda given: run(given, Stages()), given)
        with stages("predict"):
            found = bundle.to_cpu()
        starts = found.pop("ctx_init", None)
        timings = {name: seconds / len(given) for name, seconds in stages.seconds.items()}
        timings["total"] = sum(timings.values())
        of_method: dict[str, dict[str, Tensor]] = {}
        for name, value in found.items():
            method, _, what = name.rpartition("/")
            of_method.setdefault(method or self.method.name, {})[what] = value
        if starts is None:
            starts = loop.start.expand(len(given), *loop.start.shape)
        made = {name: self._made(loop, name, found, timings, views, starts) for name, found in of_method.items()}
        first = made.pop(self.method.name)
        return [
            replace(result, others={name: results[i] for name, results in made.items()}) if made else result
            for i, result in enumerate(first)
        ]

    def _made(
        self,
        loop: _Loop,
        method: str,
        found: dict[str, Tensor],
        timings: dict[str, float],
        views: list[Tensor] | None,
        starts: Tensor,
    ) -> list[TuneResult]:
        """Of what one method has found, on the CPU, a result for each image."""
        logits, before, usable = (found.pop(name) for name in ("logits", "zero_shot_logits", "usable"))
        # Numbers for numbers: one an image, in place of tensors without dimensions.
        extra = {name: value.tolist() if value.dim() == 1 else value for name, value in found.items()}
        return [
            TuneResult(
                classnames=loop.classes.names,
                logits=logits[i],
                zero_shot_logits=before[i],
                ctx_init=starts[i].clone(),
                status="tuned" if good else "skipped",
                method=method,
                extra={name: value[i] for name, value in extra.items()},
                timings=dict(timings),
                engines=self._engines(loop),
                text=loop.classes.text.describe(),
                views=None if views is None else self.clip.image.whole(views[i]).float().cpu().clone(),
            )
            for i, good in enumerate(usable.tolist())
        ]

    def run(self, classes: Classes, given: Tensor, stages: Stages, *, encoded: bool = False) -> Bundle:
        """Encode and method: the answer for B images, bundled, without waiting for the device.

        Args:
            given: views [B, N, ...], or features [B, N, D] where they are ``encoded``.
        """
        start, starts = classes.start, {}
        as_it_is = start is not None and not start.normalised
        if not encoded:
            with stages("encode"):
                given = self.clip.encode(given, normalise=not as_it_is)
        if start is not None:
            with stages("start"):
                classes = classes.started(given[:, 0], keep=self.method.gradient == Method.gradient)
                starts["ctx_init"] = classes.text.ctx_init
                given = nn.functional.normalize(given, dim=-1) if as_it_is else given
        answer = self.method(given, classes, stages)
        named = starts | _tensors(answer)
        for name, other in answer.others.items():
            named |= {f"{name}/{what}": value for what, value in _tensors(other).items()}
        return Bundle.of({name: value.float() if value.is_floating_point() else value for name, value in named.items()})

    def _at_once(self) -> int:
        """How many images fit in memory together: their views, twice during a call, and what further steps keep."""
        sides, text, own = self.clip.preprocessing.sides, self._loop.classes.text, self._loop.classes.start is not None
        bytes_each = 2 * self.clip.image.dtype.itemsize * 3 * self.config.n_views * math.prod(sides)
        if self.method.keeps_activations or (own and self.method.gradient == Method.gradient):
            bytes_each += text.describe()["kept_bytes"]
        budget = free_bytes(text.device) // 3
        if text.device.type == "cpu":  # more would gain nothing there
            budget = min(budget, BATCH_BYTES)
        return max(1, budget // bytes_each)

    def _engines(self, loop: _Loop) -> dict[str, str]:
        text, image, graphs = loop.classes.text, self.clip.image, loop.graphs
        engines = {
            "ops": str(self._backend),
            "text": text.engine,
            "image": image.engine,
            "loop": "CUDA graph" if graphs and not graphs.why_eager else self.method.loop,
            "device": str(self.device),
            "resampling": pass_order(),
        }
        reasons = {"why text": text.why_module, "why image": image.why_module}
        if loop.classes.start is not None:
            engines["start"] = "CoCoOp" + ("" if loop.classes.start.normalised else ", features as they are")
        return engines | {name: why for name, why in reasons.items() if why}

    def __repr__(self) -> str:
        names = self.classnames
        shown = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
        return f"Tuner({self.clip!r}, {len(names)} classes: {shown}; method {self.method.name!r})"


def _tensors(answer: Answer) -> dict[str, Tensor]:
    """What an answer holds, by name; an image whose logits are not finite gets the zero-shot ones."""
    usable = answer.usable if answer.usable is not None else answer.logits.isfinite().all(-1)
    logits = torch.where(usable.unsqueeze(-1), answer.logits, answer.zero_shot_logits)
    return {"logits": logits, "zero_shot_logits": answer.zero_shot_logits, "usable": usable, **answer.extra}


def _method(config: TuneConfig, objective: ObjectiveFunction | None) -> Method:
    if objective is None:
        return config.make_method(**({"autocasts": True} if config.autocasts else {}))
    if config.autocasts:
        raise ValueError("objective: expected None with strict_official and fp16, which has its own")
    method = config.make_method()
    if not isinstance(method, Tpt) or method.objective is not None:
        raise ValueError(f"objective: expected None with method {method.name!r}, which has its own")
    return replace(method, objective=objective)
