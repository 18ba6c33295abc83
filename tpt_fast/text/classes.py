"""One list of class names on one model."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ..prompting.cocoop import CoCoOp
from .encoder import StartedText, TextEncoder

Kept = TypeVar("Kept")


@dataclass(frozen=True)
class Classes:
    """C names. Each different name is encoded once, so names that repeat have equal logits to the bit."""

    names: tuple[str, ...]
    text: TextEncoder  #: of the U different names
    scale: Tensor  #: [], exp(logit scale)
    bias: Tensor | None = None  #: [], the model's logit bias, of models trained by a sigmoid loss
    inverse: Tensor | None = None  #: int64 [C], which of the different names each is; None if no name repeats
    places: tuple[Tensor, ...] = ()  #: how names that repeat are summed, see :func:`_repeats`; empty if none does
    start: CoCoOp | None = None  #: where it depends on the image what its prompt starts from
    kept: dict[Hashable, Any] = field(default_factory=dict, compare=False, repr=False)  #: once()

    @classmethod
    def of(cls, names: tuple[str, ...], text: TextEncoder, scale: Tensor, bias: Tensor | None) -> Classes:
        """``names`` whose different ones, in order of appearance, are those of ``text``."""
        different = text.classnames
        if len(different) == len(names):
            return cls(names, text, scale, bias)
        return cls(names, text, scale, bias, *_repeats(names, different, text.device))

    def started(self, features: Tensor, keep: bool) -> Classes:
        """The list as B images see it, each with a prompt of its own to start from.

        Args:
            features: [B, D] of their view 0, as :attr:`start` takes them.
            keep: whether a backward pass from there will come.
        """
        assert self.start is not None
        text: Any = StartedText(self.text, self.start(features), keep)
        return replace(self, text=text)

    def scaled(self, images: Tensor) -> Tensor:
        """Features of views times the logit scale, as :meth:`logits` takes them."""
        return self.scale * images

    def logits(self, images: Tensor, features: Tensor) -> Tensor:
        """Logits of views.

        Args:
            images: scaled features [B, N, D].
            features: of the different names, [U, D] for all images or [B, U, D].

        Returns:
            [B, N, C].
        """
        logits = images @ features.to(images.dtype).mT
        logits = logits if self.bias is None else logits + self.bias
        return logits if self.inverse is None else logits[..., self.inverse]

    def grad_features(self, images: Tensor, grad_logits: Tensor) -> Tensor:
        """Gradient [B, U, D] of the text features, from the same rows of the scaled image features [B, K, D] and of the
        logits' gradient [B, K, C]."""
        return self.fold(grad_logits).mT @ images

    def expand(self, features: Tensor) -> Tensor:
        """From rows of the different names [.., U, D] to those of all [.., C, D]."""
        return features if self.inverse is None else features[..., self.inverse, :]

    def fold(self, columns: Tensor) -> Tensor:
        """The sum over equal names: from columns of all names [.., C] to those of the different ones [.., U]."""
        for places in self.places:  # in a fixed order, which index_add on a GPU would not keep
            columns = nn.functional.pad(columns, (0, 1))[..., places].sum(-1)
        return columns

    def prototypes(self, templates: Sequence[str] | None) -> Tensor:
        """Class vectors [U, D] of length 1, encoded once: the mean over ``templates`` of the features, each of length
        1, of the prompts that they make. None stands for the one prompt that tuning starts from.

        Raises:
            ValueError: a prompt over the context length.
        """
        if templates is None:
            return self.text.initial()[0]
        names = [name.replace("_", " ") for name in self.text.classnames]
        prompts = ([template.replace("{}", name) for name in names] for template in templates)

        def mean() -> Tensor:
            total = sum(self.text.tower.encode(prompts), start=torch.zeros((), device=self.text.device))
            return nn.functional.normalize(total / len(templates), dim=-1)

        return self.once(("prototypes", tuple(templates)), mean)

    def once(self, key: Hashable, make: Callable[[], Kept]) -> Kept:
        """What ``make`` returns, made at the first call with ``key``, which names the method too.

        A method calls it from :meth:`~tpt_fast.methods.Method.prepare` first: a CUDA graph that is captured must find
        everything made.
        """
        found = self.kept.get(key)
        return self.kept.setdefault(key, make()) if found is None else found

    def tensors(self) -> list[Tensor]:
        """What the list holds beside the text tower."""
        kept = [each for value in self.kept.values() for each in (value if isinstance(value, tuple) else (value,))]
        start = () if self.start is None else self.start.tensors()
        return [*([] if self.inverse is None else [self.inverse]), *self.places, *start, *kept]


_TOGETHER = 16  # repeats that one sum takes: a table as wide as the most repeats would be U times that


def _repeats(names: Sequence[str], different: Sequence[str], device: torch.device) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Which of the different names each of the C is, and the places of each among the C, in rounds.

    A round is int64 [n, at most 16], n sums of what stands at these places before it, filled up with the place behind
    the last one. The sums of the last round are those of the U different names, in order.
    """
    place = {name: i for i, name in enumerate(different)}
    standing: list[list[int]] = [[] for _ in different]
    for i, name in enumerate(names):
        standing[place[name]].append(i)
    rounds: list[Tensor] = []
    end = len(names)
    while not rounds or len(rounds[-1]) > len(different):
        width = min(_TOGETHER, max(map(len, standing)))
        sums: list[list[int]] = []
        following: list[list[int]] = []
        for at in standing:
            parts = [at[i : i + width] for i in range(0, len(at), width)]
            following.append(list(range(len(sums), len(sums) + len(parts))))
            sums += [part + [end] * (width - len(part)) for part in parts]
        rounds.append(torch.tensor(sums, device=device))
        standing, end = following, len(sums)
    return torch.tensor([place[name] for name in names], device=device), tuple(rounds)
