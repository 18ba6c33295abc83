"""Test-time prompt tuning of one image: views, encode, objective, update, predict."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from threading import Lock

import torch
from torch import Tensor, nn

from . import _jit
from .adapters import PRECISIONS, text_root, token_embedding
from .config import TuneConfig
from .images import load_image
from .ops import objective
from .prompts import check_classnames, load_ctx
from .reference.adamw_step import adamw_step
from .result import TuneResult
from .text import TextEncoder
from .views import draw_boxes, make_views, pass_order
from .vision import ImageEncoder, preprocessing

Objective = Callable[[Tensor], Tensor]


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

    def __init__(
        self,
        model: nn.Module,
        classnames: Sequence[str],
        config: TuneConfig | None = None,
        *,
        tokenizer: Callable | None = None,
        objective: Objective | None = None,
    ) -> None:
        if config is not None and not isinstance(config, TuneConfig):
            raise TypeError(f"config: expected a TuneConfig, got {type(config).__name__}")
        if objective is not None and not callable(objective):
            raise TypeError(f"objective: expected a function of the logits, got {type(objective).__name__}")
        self.config = config or TuneConfig()
        self.preprocessing = preprocessing(model)
        self._model, self._tokenizer, self._objective = model, tokenizer, objective
        self._backend = _jit.ensure()
        self.set_classnames(classnames)
        self._images = ImageEncoder(model, PRECISIONS[self.config.precision])
        self._scale = model.logit_scale.detach().float().exp()

    def set_classnames(self, classnames: Sequence[str]) -> None:
        """Tune for another list of classes from now on; calls under way finish with the old one."""
        config, names = self.config, check_classnames(classnames)
        width = token_embedding(text_root(self._model)).weight.shape[1]
        ctx = None if config.ctx is None else load_ctx(config.ctx, width)
        different = list(dict.fromkeys(names))
        if ctx is not None and ctx.dim() == 3:  # class-specific contexts tell equal names apart
            different = list(names)
        place = {name: i for i, name in enumerate(different)}
        repeated = len(different) < len(names)
        text = TextEncoder(
            self._model,
            different,
            config.ctx_init,
            n_ctx=config.n_ctx,
            ctx=ctx,
            seed=config.seed,
            tokenizer=self._tokenizer,
            engine=config.engine,
            precision=config.precision,
        )
        text.initial()
        inverse = torch.tensor([place[name] for name in names], device=text.device) if repeated else None
        self._classes = _Classes(names, text, inverse)

    @property
    def classnames(self) -> tuple[str, ...]:
        """The C names as they were given."""
        return self._classes.names

    def __call__(self, image, *, boxes: Tensor | None = None, keep_views: bool = False) -> TuneResult:
        """Tune the prompt for ``image`` and classify it.

        Args:
            image: a path, a PIL image, or a uint8 array or tensor [H, W, 3] or [3, H, W]; see :func:`load_image`.
            boxes: int32 [n_views - 1, 5] crops (top, left, height, width, flip) to use instead of drawn ones.
            keep_views: keep the views in the result, for :meth:`TuneResult.plot`.

        Raises:
            TypeError, ValueError, OSError: an image that cannot be read, naming what is wrong with it.
        """
        stages = _Stages()
        with stages("load"):
            pixels = load_image(image)
        with stages("views"):
            if boxes is None:
                # None stands for torch's global generator, from which the published code draws.
                seed = None if self.config.strict_official else self.config.seed
                boxes = draw_boxes(pixels.shape[0], pixels.shape[1], self.config.n_views - 1, seed=seed)
            views = make_views(pixels.to(self._scale.device), boxes=boxes, **self.preprocessing._asdict())
        return self._tune(views, stages, keep_views)

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
        return self._tune(views.to(self._scale.device), _Stages(), keep_views)

    @torch.no_grad()
    def _tune(self, views: Tensor, stages: _Stages, keep_views: bool) -> TuneResult:
        config, classes = self.config, self._classes
        text = classes.text
        kept = config.n_selected(len(views))
        with stages("encode"):
            images = self._images.encode(views)
        ctx, (features, tape) = text.ctx_init, text.initial()
        exp_avg, exp_avg_sq = torch.zeros_like(ctx), torch.zeros_like(ctx)
        grad = torch.zeros_like(ctx)
        selected, status, first = None, "tuned", None
        images = self._scale * images
        zero_shot = classes.logits(images, features)[0]

        for step in range(1, config.steps + 1):
            with stages("objective"):
                logits = classes.logits(images, features)
                found = objective(logits, kept, selected)
                loss, grad_logits, rows = self._differentiate(logits, found)
                grad_features = classes.grad_features(images[rows], grad_logits)
                first, selected = first or (found.entropy, loss), found.selected
            with stages("text backward"):
                grad = text.backward(tape, grad_features)
            with stages("update"):
                if not bool(grad.isfinite().all() & loss.isfinite()):
                    status = "skipped"
                    break
                ctx, exp_avg, exp_avg_sq = adamw_step(
                    ctx, grad, exp_avg, exp_avg_sq, step, config.lr, weight_decay=config.weight_decay
                )
            with stages("text forward"):
                features, tape = text.forward(ctx, keep=step < config.steps)

        with stages("predict"):
            if status == "skipped":
                ctx, (features, _) = text.ctx_init, text.initial()
            logits = classes.logits(images, features)
            found = objective(logits, kept, selected)
            loss_after = self._differentiate(logits, found)[0]
            entropy, loss = first or (found.entropy, loss_after)
            answer = {"logits": logits[0], "zero_shot_logits": zero_shot, "ctx_init": text.ctx_init, "ctx": ctx}
            answer |= {"entropies": entropy, "grad": grad}
            answer = {name: value.float().cpu() for name, value in answer.items()}
        return TuneResult(
            classnames=classes.names,
            **answer,
            selected=found.selected.cpu(),
            loss=float(loss),
            loss_after=float(loss_after),
            status=status,
            timings=stages.finish(),
            engines=self._engines(text),
            views=views.float().cpu() if keep_views else None,
        )

    def _differentiate(self, logits: Tensor, found) -> tuple[Tensor, Tensor, Tensor | slice]:
        """Loss, its gradient with respect to some rows of the logits, and which rows."""
        if self._objective is None:
            return found.loss, found.grad, found.selected
        with torch.enable_grad():
            leaf = logits.detach().requires_grad_()
            loss = self._objective(leaf)
            if not isinstance(loss, Tensor) or loss.numel() != 1:
                raise ValueError("objective: expected it to return a scalar tensor")
            (grad,) = torch.autograd.grad(loss, leaf)
        return loss.detach().reshape(()), grad, slice(None)

    def _engines(self, text: TextEncoder) -> dict[str, str]:
        return {
            "ops": self._backend.name,
            "text": text.engine,
            "image": self._images.engine,
            "device": str(self._scale.device),
            "resampling": pass_order(),
        }


@dataclass(frozen=True)
class _Classes:
    """One list of classes. Each different name is encoded once, so names that repeat have equal logits to the bit."""

    names: tuple[str, ...]
    text: TextEncoder
    inverse: Tensor | None  # [C], which of the different names each is; None if no name repeats

    def logits(self, images: Tensor, features: Tensor) -> Tensor:
        """[N, C] from scaled image features [N, D] and text features [U, D]."""
        logits = images @ features.to(images.dtype).T
        return logits if self.inverse is None else logits[:, self.inverse]

    def grad_features(self, images: Tensor, grad_logits: Tensor) -> Tensor:
        """[U, D] from the same rows of the scaled image features [K, D] and of the logits' gradient [K, C]."""
        if self.inverse is not None:
            different = grad_logits.new_zeros(len(grad_logits), len(self.text.classnames))
            grad_logits = different.index_add_(1, self.inverse, grad_logits)
        return grad_logits.T @ images


class _Stages:
    """Wall-clock seconds of named stages, summed over repeats."""

    def __init__(self) -> None:
        self._started = time.perf_counter()
        self._seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, name: str):
        started = time.perf_counter()
        yield
        self._seconds[name] = self._seconds.get(name, 0.0) + time.perf_counter() - started

    def finish(self) -> dict[str, float]:
        return {**self._seconds, "total": time.perf_counter() - self._started}


_KEPT_TUNERS = 4
_tuners: OrderedDict[tuple, Tuner] = OrderedDict()
_tuners_lock = Lock()


def tune(
    model: nn.Module,
    image,
    classnames: Sequence[str],
    *,
    tokenizer: Callable | None = None,
    objective: Objective | None = None,
    keep_views: bool = False,
    **options,
) -> TuneResult:
    """Classify ``image`` by CLIP with a prompt tuned for it (test-time prompt tuning, Shu et al., NeurIPS 2022).

    The last few Tuners are kept, so a loop over ``tune`` with the same model and names costs no more than a
    :class:`Tuner`; changing the model's weights in place is noticed.

    Args:
        model, classnames, tokenizer, objective: see :class:`Tuner`.
        image, keep_views: see :meth:`Tuner.__call__`.
        options: the fields of :class:`TuneConfig`.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected an open_clip CLIP or CustomTextCLIP, got {type(model).__name__}")
    names = classnames if isinstance(classnames, str) else tuple(classnames)
    config = TuneConfig(**options)
    versions = sum(tensor._version for tensor in (*model.parameters(), *model.buffers()))
    places = {(p.device, p.dtype) for p in model.parameters()}
    chosen = tuple(
        (name, id(value) if isinstance(value, Tensor) else value, getattr(value, "_version", None))
        for name, value in vars(config).items()
    )
    key = (id(model), names, chosen, id(tokenizer), id(objective), versions, frozenset(places))
    with _tuners_lock:
        tuner = _tuners.get(key)
        if tuner is None:
            tuner = Tuner(model, names, config, tokenizer=tokenizer, objective=objective)
            _tuners[key] = tuner
            while len(_tuners) > _KEPT_TUNERS:
                _tuners.popitem(last=False)
        _tuners.move_to_end(key)
    return tuner(image, keep_views=keep_views)
