"""TDA (Karmanov et al., CVPR 2024): a cache of confident features, and one of what uncertain images are not."""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from .._checks import check_bool, check_integer, check_number
from .._fields import described
from .._locks import Lock
from .._stages import Stages
from ..text.classes import Classes
from ..text.templates import Templates, read_templates
from . import Answer, Method, n_selected
from .zero_shot import zero_shot


@dataclass
class Cache:
    """Items of each class, ascending in entropy; an entropy of infinity is a free place."""

    entropies: Tensor  #: [U, capacity]
    features: Tensor  #: [U, capacity, D]
    probs: Tensor  #: [U, capacity, U], class probabilities
    images: Tensor  #: int64 [U, capacity], which images they were, counted from 0

    @classmethod
    def empty(cls, classes: Tensor, capacity: int) -> Cache:
        """For the classes of features [U, D]."""
        n = len(classes)
        none = torch.full_like(classes[:, :1], torch.inf).repeat(1, capacity)
        counts = torch.full_like(none, -1, dtype=torch.int64)
        return cls(none, classes.new_zeros(n, capacity, classes.shape[1]), classes.new_zeros(n, capacity, n), counts)

    def add(self, label: Tensor, entropy: Tensor, feature: Tensor, probs: Tensor, image: Tensor) -> None:
        """Sort an item in behind its equals; what is one too many falls out, this one first if it is no better."""
        entropies, order = torch.cat([self.entropies[label], entropy.view(1, 1)], 1).sort(stable=True)
        order = order[0, : self.entropies.shape[1]]
        for held, new in ((self.features, feature), (self.probs, probs), (self.images, image)):
            held[label] = torch.cat([held[label][0], new.unsqueeze(0)])[order].unsqueeze(0)
        self.entropies[label] = entropies[:, : len(order)]

    def affinity(self, feature: Tensor, alpha: float, beta: float) -> Tensor:
        """[U, capacity] of the items to a feature [D]; 0 at free places."""
        near = alpha * (-beta * (1 - self.features @ feature)).exp()
        return near.masked_fill(self.entropies.isinf(), 0)


@dataclass
class _Memory:
    """What changes: of one class list, under a lock."""

    lock: Lock = field(default_factory=Lock)
    classes: Classes | None = None
    seen: int = 0
    positive: Cache = field(init=False)  #: there with the classes
    negative: Cache = field(init=False)


@dataclass(frozen=True)
class Tda(Method):
    """Logits plus what images like this one were, minus what uncertain ones like it were not. Learns from each image.

    Names that repeat count as one class.
    """

    name: ClassVar[str] = "tda"
    paper: ClassVar[str] = "Karmanov et al., CVPR 2024"
    tunes: ClassVar[str] = "caches, over the stream"
    gradient: ClassVar[str] = "none"
    online: ClassVar[bool] = True

    rho: float = described("Part of the views that is kept, in (0, 1], at least one. Published code: 0.1.", 0.1)
    plain_view: bool = described(
        "The plain image alone, as published for ImageNet and the fine-grained sets; else the mean of the kept views.",
        False,
    )
    templates: Templates = described(
        'Prompts whose mean each class vector is: a list, "openai", "simple" (published for ImageNet), or None for the '
        "one of ctx_init.",
        None,
    )
    positive_capacity: int = described("Items a class. Published: 3.", 3)
    positive_alpha: float = described("Weight of the positive cache. Published for ImageNet: 2.", 2.0)
    positive_beta: float = described("Sharpness of its affinities. Published for ImageNet: 5.", 5.0)
    negative_capacity: int = described("Items a class; 0 is no negative cache. Published: 2.", 2)
    negative_alpha: float = described("Weight of the negative cache. Published: 0.117.", 0.117)
    negative_beta: float = described("Sharpness of its affinities. Published: 1.", 1.0)
    negative_entropy: tuple[float, float] = described(
        "Entropies, in nats over log2(C), between which an image enters the negative cache. Published: (0.2, 0.5).",
        (0.2, 0.5),
    )
    negative_mask: tuple[float, float] = described(
        "Probabilities between which a class is one that such an image is not. Published: (0.03, 1).", (0.03, 1.0)
    )
    strict: bool = described("Scale logits by 100, as the published code, and not by the model's own.", False)
    _memory: _Memory = field(default_factory=_Memory, compare=False, repr=False)

    def __post_init__(self) -> None:
        check_number("rho", self.rho, "a number in (0, 1]", lambda v: 0 < v <= 1)
        for name in ("plain_view", "strict"):
            check_bool(name, getattr(self, name))
        object.__setattr__(self, "templates", read_templates(self.templates))
        check_integer("positive_capacity", self.positive_capacity, 1)
        check_integer("negative_capacity", self.negative_capacity, 0)
        for name in ("positive_alpha", "positive_beta", "negative_alpha", "negative_beta"):
            check_number(name, getattr(self, name), "a number of 0 or more", lambda v: v >= 0)
        for name in ("negative_entropy", "negative_mask"):
            object.__setattr__(self, name, _ascending(name, getattr(self, name)))

    def prepare(self, classes: Classes) -> None:
        if len(classes.text.classnames) < 2:
            raise ValueError("classnames: expected two or more different ones with method 'tda', got 1")
        memory, vectors = self._memory, classes.prototypes(self.templates)
        with memory.lock:
            if memory.seen and memory.classes is not classes:
                raise ValueError(
                    f"method: this Tda has learned from {memory.seen} images of another Tuner: make a new one"
                )
            memory.classes = classes
            memory.positive = Cache.empty(vectors, self.positive_capacity)
            memory.negative = Cache.empty(vectors, self.negative_capacity)

    def __call__(self, images: Tensor, classes: Classes, stages: Stages) -> Answer:
        with stages("caches"), self._memory.lock:
            if self._memory.classes is not classes:
                raise ValueError("method: this Tda belongs to another Tuner, or an earlier class list: make a new one")
            logits, found = zip(*(self._learn(each, classes) for each in images), strict=True)
        extra = {name: torch.stack([each[name] for each in found]) for name in found[0]}
        return Answer(torch.stack(logits), zero_shot(images, classes), extra=extra)

    def _learn(self, views: Tensor, classes: Classes) -> tuple[Tensor, dict[str, Tensor]]:
        """Of one image's views [N, D]: both caches, and then the logits [C]."""
        memory, vectors = self._memory, classes.prototypes(self.templates)
        views = views[:1] if self.plain_view else views
        logits = (100.0 if self.strict else classes.scale) * views @ vectors.mT
        log_probs = logits.log_softmax(-1)
        kept = (-(log_probs.exp() * log_probs).sum(-1)).argsort(stable=True)[: n_selected(len(views), self.rho)]
        feature, logits = views[kept].mean(0), logits[kept].mean(0)
        log_probs = log_probs[kept].logsumexp(0) - math.log(len(kept))
        probs = log_probs.exp()
        entropy = -(probs * log_probs.clamp_min(torch.finfo(probs.dtype).min)).sum()
        label = logits.argmax().view(1)

        low, high = self.negative_entropy
        relative = entropy / math.log2(len(vectors))
        image = torch.full_like(label[0], memory.seen)
        usable = torch.where(entropy.isfinite(), entropy, torch.inf)  # infinity sorts behind every place
        unsure = torch.where((low < relative) & (relative < high), usable, torch.inf)
        memory.positive.add(label, usable, feature, probs, image)
        memory.negative.add(label, unsure, feature, probs, image)
        memory.seen += 1

        near = memory.positive.affinity(feature, self.positive_alpha, self.positive_beta)
        unlike = memory.negative.affinity(feature, self.negative_alpha, self.negative_beta)
        low, high = self.negative_mask
        mask = ((low < memory.negative.probs) & (memory.negative.probs < high)).to(unlike.dtype)
        answer = logits + near.sum(-1) - (unlike.flatten() @ mask.flatten(0, 1))
        return classes.expand(answer.unsqueeze(-1)).squeeze(-1), {"entropy": entropy, "selected": kept}

    # --- to save and resume

    def state(self) -> dict[str, Tensor]:
        """Both caches, how many images it has seen and a checksum of the class names, on the CPU."""
        with self._memory.lock:
            if self._memory.classes is None:
                return {}
            caches = {"positive": self._memory.positive, "negative": self._memory.negative}
            tensors = {f"{of}.{name}": value for of, cache in caches.items() for name, value in vars(cache).items()}
            return {name: value.cpu().clone() for name, value in tensors.items()} | self._counts()

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        memory = self._memory
        with memory.lock:
            if memory.classes is None:
                raise ValueError("state: expected a method that a Tuner has, for it needs the class list")
            if not state or not torch.equal(state["classes"], self._counts()["classes"]):
                raise ValueError("state: expected one of the same class names, got one of others")
            for of, cache in (("positive", memory.positive), ("negative", memory.negative)):
                for name, held in vars(cache).items():
                    new = state[f"{of}.{name}"]
                    if new.shape != held.shape:
                        raise ValueError(f"state: expected {of}.{name} {list(held.shape)}, got {list(new.shape)}")
                    setattr(cache, name, new.to(held.device, held.dtype, copy=True))
            memory.seen = int(state["seen"])

    def _counts(self) -> dict[str, Tensor]:
        assert self._memory.classes is not None
        names = zlib.crc32("\n".join(self._memory.classes.names).encode())
        return {"seen": torch.tensor(self._memory.seen), "classes": torch.tensor(names)}


def _ascending(name: str, value: Any) -> tuple[float, float]:
    if not isinstance(value, (tuple, list)) or len(value) != 2:
        raise TypeError(f"{name}: expected two ascending numbers, got {type(value).__name__} {value!r}")
    for each in value:
        check_number(name, each, "two ascending numbers", lambda v: value[0] < value[1])
    return tuple(value)
