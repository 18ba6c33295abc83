"""CoOp and CoCoOp trained on features that are encoded once, their text features by the packed tower."""

from __future__ import annotations

import json
import math
import os
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD

from .._checks import MAX_SEED, check_bool, check_integer, check_number
from .._files import atomic_write, check_writable
from .._modes import ON_THE_CPU, plain_modes
from ..clip import Clip
from ..text import TextEncoder
from ..text.classes import Classes
from ..text.prompts import check_classnames
from ..views.decode import ImageLike
from .cocoop import META_NET, CoCoOp
from .examples import check_features, encode_examples


@dataclass(frozen=True)
class Recipe:
    """How long and by which steps: SGD whose learning rate is constant and low in the first epochs, and then falls as a
    cosine does. The defaults are CoOp's published ones."""

    epochs: int = 50
    batch_size: int = 32
    lr: float = 2e-3
    momentum: float = 0.9
    weight_decay: float = 5e-4
    warmup_epochs: int = 1
    warmup_lr: float = 1e-5
    seed: int = 1

    def __post_init__(self) -> None:
        check_integer("epochs", self.epochs, 1)
        check_integer("batch_size", self.batch_size, 1)
        check_integer("warmup_epochs", self.warmup_epochs, 0)
        check_integer("seed", self.seed, 0, MAX_SEED)
        for name in ("lr", "weight_decay", "warmup_lr"):
            check_number(name, getattr(self, name), "a number of 0 or more", lambda value: value >= 0)
        check_number("momentum", self.momentum, "a number in [0, 1)", lambda value: 0 <= value < 1)

    def rate(self, epoch: int) -> float:
        """The learning rate of an epoch, from 0 on. The cosine begins behind the warm-up, and is as long as all epochs,
        so the last epochs do not reach 0: so does the published scheduler."""
        if epoch < self.warmup_epochs:
            return self.warmup_lr
        return self.lr * (1 + math.cos(math.pi * (epoch - self.warmup_epochs) / self.epochs)) / 2


@dataclass(frozen=True, eq=False)
class Trained:
    """What training has found. ``tpt_fast.save_ctx(trained.ctx, path, clip)`` keeps it."""

    ctx: Tensor | CoCoOp  #: as ``ctx=`` takes it
    losses: list[float] = field(repr=False)  #: the mean cross-entropy of each epoch, as it was trained
    accuracies: list[float] = field(repr=False)  #: likewise, the share of the training views that were classified right
    text: dict[str, Any] = field(repr=False)  #: what the text tower chose: TextEncoder.describe()


@plain_modes
def train_coop(
    model: nn.Module | Clip,
    images: Sequence[ImageLike] | Tensor,
    labels: Sequence[int] | Tensor,
    classnames: Sequence[str],
    *,
    ctx_init: str = "a photo of a",
    n_ctx: int | None = 16,
    class_specific: bool = False,
    views: int = 8,
    checkpoint: str | os.PathLike | None = None,
    resume: bool = False,
    progress: bool = True,
    **recipe: Any,
) -> Trained:
    """Learn a context from labelled images (CoOp, Zhou et al., IJCV 2022).

    Args:
        model: see :class:`~tpt_fast.Tuner`; its weights stay as they are.
        images: N images as :func:`tpt_fast.load_image` takes them, or their features [N, V, D], of
            :func:`tpt_fast.prompting.encode_examples`.
        labels: N integers, 0 to C - 1.
        classnames: C names.
        ctx_init, n_ctx: where the context starts, as :class:`~tpt_fast.TuneConfig` has it: ``n_ctx`` random vectors, or
            with None the words of ``ctx_init``. "[CLS]" in ``ctx_init`` says where the class name stands.
        class_specific: a context for each class.
        views: random crops that are kept of each image; each epoch reads the next one. As many as there are epochs
            gives each epoch crops of its own, as published; 0 is the plain image.
        checkpoint: a file that is written after each epoch, whole or not at all, which CoOp's trainer reads too: as
            ``prompt_learner/model.pth.tar-50`` in the folder that it is given.
        resume: go on from ``checkpoint`` where it is there; what comes out is the same to the bit.
        progress: whether to draw bars.
        recipe: ``epochs``, ``batch_size``, ``lr``, ``momentum``, ``weight_decay``, ``warmup_epochs``, ``warmup_lr``,
            ``seed``, see :class:`~tpt_fast.prompting.train.Recipe`.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came; a checkpoint of another training.
        FileExistsError: ``checkpoint`` is there, and not to ``resume``.
        FloatingPointError: the loss is not finite.
    """
    plan = Recipe(**recipe)
    check_bool("class_specific", class_specific)

    def learner(text: TextEncoder, features: int) -> _Coop:
        return _Coop(text.ctx_init)

    clip = model if isinstance(model, Clip) else Clip(model)
    classes = _classes(clip, check_classnames(classnames), ctx_init, n_ctx, plan.seed, class_specific)
    told = {"method": "coop", "ctx_init": ctx_init, "class_specific": class_specific}
    return _train(clip, images, labels, classes, learner, plan, told, views, checkpoint, resume, progress)


@plain_modes
def train_cocoop(
    model: nn.Module | Clip,
    images: Sequence[ImageLike] | Tensor,
    labels: Sequence[int] | Tensor,
    classnames: Sequence[str],
    *,
    ctx_init: str = "a photo of a",
    n_ctx: int | None = None,
    views: int = 8,
    checkpoint: str | os.PathLike | None = None,
    resume: bool = False,
    progress: bool = True,
    **recipe: Any,
) -> Trained:
    """Learn a context and the net that moves it for each image (CoCoOp, Zhou et al., CVPR 2022).

    As :func:`train_coop`, with CoCoOp's published recipe: 10 epochs, one image at a time, from the words "a photo of
    a". Each image of a batch keeps activations of its own.
    """
    plan = Recipe(**{"epochs": 10, "batch_size": 1, **recipe})

    def learner(text: TextEncoder, features: int) -> _Cocoop:
        return _Cocoop(text.ctx_init, features, plan.seed)

    clip = model if isinstance(model, Clip) else Clip(model)
    classes = _classes(clip, check_classnames(classnames), ctx_init, n_ctx, plan.seed)
    told = {"method": "cocoop", "ctx_init": ctx_init}
    return _train(clip, images, labels, classes, learner, plan, told, views, checkpoint, resume, progress)


class _Coop(nn.Module):
    """CoOp's prompt learner, to its names."""

    def __init__(self, ctx: Tensor) -> None:
        super().__init__()
        self.ctx = nn.Parameter(ctx.clone())

    def forward(self, features: Tensor) -> Tensor:
        return self.ctx

    def learned(self) -> Tensor:
        return self.ctx.detach().float().cpu().clone()


class _Cocoop(nn.Module):
    """CoCoOp's, to its names; its net is drawn as ``nn.Linear`` draws, from the seed."""

    def __init__(self, ctx: Tensor, features: int, seed: int) -> None:
        super().__init__()
        hidden = max(1, features // 16)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            first = nn.Linear(features, hidden, **ON_THE_CPU)
            second = nn.Linear(hidden, ctx.shape[-1], **ON_THE_CPU)
        net = nn.Sequential(OrderedDict([("linear1", first), ("relu", nn.ReLU()), ("linear2", second)]))
        self.ctx, self.meta_net = nn.Parameter(ctx.clone()), net.to(ctx.device, ctx.dtype)

    def forward(self, features: Tensor) -> Tensor:
        return self.ctx + self.meta_net(features).unsqueeze(1)

    def learned(self) -> CoCoOp:
        fields = {"ctx": "ctx", **META_NET}
        found = {fields[name]: tensor.float().cpu().clone() for name, tensor in self.state_dict().items()}
        return CoCoOp(**found, normalised=True)


def _train(
    clip: Clip,
    images: Sequence[ImageLike] | Tensor,
    labels: Sequence[int] | Tensor,
    classes: Classes,
    learner: Callable[[TextEncoder, int], _Coop | _Cocoop],
    plan: Recipe,
    told: dict[str, Any],
    views: int,
    checkpoint: str | os.PathLike | None,
    resume: bool,
    progress: bool,
) -> Trained:
    if checkpoint is not None:
        check_writable(checkpoint)
        if os.path.exists(checkpoint) and not resume:
            raise FileExistsError(f"checkpoint: {os.fspath(checkpoint)!r} is there; resume=True goes on from it")
    targets = _check_labels(labels, len(images), len(classes.names)).to(clip.device)
    if not isinstance(images, Tensor):
        images = encode_examples(clip, images, views=views, seed=plan.seed, progress=progress)
    text = classes.text
    features = check_features(images, text.forward(text.ctx_init)[0])
    told |= {"n_ctx": text.prompts.n_ctx, "classnames": [*classes.names], "labels": targets.tolist(), **vars(plan)}
    told |= {"views": features.shape[1], "model": clip.text.digest}
    run = _Run(classes, learner(text, features.shape[-1]), plan, features, targets)
    if checkpoint is not None and os.path.exists(checkpoint):
        run.load(Path(checkpoint), told)
    run.fit(checkpoint, told, progress)
    return Trained(run.learner.learned(), run.losses, run.accuracies, text.describe())


class _Run:
    """A training under way."""

    def __init__(self, classes: Classes, learner: Any, plan: Recipe, features: Tensor, targets: Tensor) -> None:
        self.classes, self.learner, self.plan = classes, learner, plan
        self._features, self._targets = features, targets
        self._own = isinstance(learner, _Cocoop)  # each image has class features of its own
        self._optimizer = SGD(
            learner.parameters(), lr=plan.lr, momentum=plan.momentum, weight_decay=plan.weight_decay, foreach=False
        )
        self.losses: list[float] = []
        self.accuracies: list[float] = []

    def fit(self, checkpoint: str | os.PathLike | None, told: dict[str, Any], progress: bool) -> None:
        from tqdm.auto import tqdm

        done = len(self.losses)
        with tqdm(total=self.plan.epochs, initial=done, desc="training", unit="epoch", disable=not progress) as bar:
            for epoch in range(done, self.plan.epochs):
                self._epoch(epoch)
                bar.set_postfix(loss=f"{self.losses[-1]:.3f}", accuracy=f"{self.accuracies[-1]:.1%}", refresh=False)
                bar.update()
                if checkpoint is not None:
                    self.save(checkpoint, told)

    def _epoch(self, epoch: int) -> None:
        plan, count = self.plan, len(self._targets)
        for group in self._optimizer.param_groups:
            group["lr"] = plan.rate(epoch)
        # Of each epoch its own, so that one that goes on from a file draws the same.
        shuffle = torch.Generator().manual_seed((plan.seed + epoch) % MAX_SEED)
        order = torch.randperm(count, generator=shuffle, device="cpu")
        batches = order.to(self._targets.device).split(plan.batch_size)
        if count > plan.batch_size and len(batches[-1]) < plan.batch_size:
            batches = batches[:-1]  # as published
        features = self._features[:, epoch % self._features.shape[1]]
        seen = torch.zeros(2, dtype=torch.float64, device=self._targets.device)
        for batch in batches:
            loss, right = self.step(features[batch], self._targets[batch])
            seen += torch.stack([loss.double() * len(batch), right.double()])
        mean, accuracy = (seen / sum(map(len, batches))).tolist()
        if not math.isfinite(mean):
            raise FloatingPointError(f"the loss of epoch {epoch + 1} is {mean}; lower lr={plan.lr}")
        self.losses.append(mean)
        self.accuracies.append(accuracy)

    @torch.enable_grad()
    def step(self, features: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """One step of the optimizer; the loss before it, and how many of the batch were right."""
        self._optimizer.zero_grad()
        logits = self.logits(features)
        loss = nn.functional.cross_entropy(logits, targets)
        loss.backward()
        self._optimizer.step()
        return loss.detach(), (logits.detach().argmax(-1) == targets).sum()

    def logits(self, features: Tensor) -> Tensor:
        """[B, C] of features [B, D]."""
        text = self.classes.text.encode(self.learner(features))
        images = self.classes.scaled(features)
        return self.classes.logits(images[:, None] if self._own else images[None], text).flatten(0, 1)

    def save(self, path: str | os.PathLike, told: dict[str, Any]) -> None:
        """As CoOp's trainer leaves it, but for the embeddings of the training classes, which every reader throws away;
        and what going on needs."""
        mine = {"settings": json.dumps(told), "losses": self.losses, "accuracies": self.accuracies}
        content = {
            "state_dict": self.learner.state_dict(),
            "epoch": len(self.losses),
            "optimizer": self._optimizer.state_dict(),
            "scheduler": None,
            "val_result": None,
            "tpt_fast": mine | {"images": self._mark()},
        }
        with atomic_write(path) as aside, open(aside, "wb") as file:
            torch.save(content, file)  # into a path of no ending it would refuse to

    def load(self, path: Path, told: dict[str, Any]) -> None:
        """Go on from there.

        Raises:
            ValueError: another training's.
        """
        where = f"checkpoint: {os.fspath(path)!r}"
        try:
            content = torch.load(path, map_location=self._targets.device, weights_only=True)
            mine = content["tpt_fast"]
            theirs = json.loads(mine["settings"])
        except Exception as error:  # a damaged file, or one of CoOp's own
            raise ValueError(f"{where} is no training that can go on here: {error}") from error
        now = json.loads(json.dumps(told))
        if other := sorted(name for name in now.keys() | theirs.keys() if now.get(name) != theirs.get(name)):
            shown = ", ".join(
                f"{name} {_short(theirs.get(name))} there, {_short(now.get(name))} here" for name in other
            )
            raise ValueError(f"{where} is another training's: {shown}")
        if not torch.allclose(mine["images"], self._mark(), rtol=0, atol=1e-4):
            raise ValueError(f"{where} is of other images")
        self.learner.load_state_dict(content["state_dict"])
        self._optimizer.load_state_dict(content["optimizer"])
        self.losses, self.accuracies = mine["losses"], mine["accuracies"]

    def _mark(self) -> Tensor:
        """[D], by which other images, and another order of them, are known; rounding does not change it by much."""
        count = len(self._features)
        noise = torch.randn(count, generator=torch.Generator().manual_seed(0), **ON_THE_CPU).to(self._features)
        return noise @ self._features.mean(1) / count**0.5


def _classes(
    clip: Clip, names: tuple[str, ...], ctx_init: str, n_ctx: int | None, seed: int, class_specific: bool = False
) -> Classes:
    different = list(names) if class_specific else list(dict.fromkeys(names))
    text = TextEncoder(clip.text, different, ctx_init, n_ctx=n_ctx, seed=seed)
    if class_specific:
        ctx = text.ctx_init.expand(len(names), -1, -1)
        if n_ctx is not None:  # for each class others
            ctx = 0.02 * torch.randn(ctx.shape, generator=torch.Generator().manual_seed(seed), **ON_THE_CPU)
        text = TextEncoder(clip.text, different, ctx_init, ctx=ctx)
    return Classes.of(names, text, clip.scale, clip.bias)


def _check_labels(labels: Sequence[int] | Tensor, count: int, classes: int) -> Tensor:
    found = torch.as_tensor(labels, device="cpu")
    if found.is_floating_point() or found.dtype == torch.bool or list(found.shape) != [count]:
        raise ValueError(f"labels: expected {count} integers, one an image, got {found.dtype} {list(found.shape)}")
    if found.min() < 0 or found.max() >= classes:
        raise ValueError(f"labels: expected 0 to {classes - 1}, got {int(found.min())} to {int(found.max())}")
    return found.long()


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
