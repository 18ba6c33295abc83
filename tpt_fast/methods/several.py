"""Several methods on one encoding of the views."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from torch import Tensor

from .._stages import Stages
from ..text.classes import Classes
from . import Answer, Method


@dataclass(frozen=True)
class Several(Method):
    """Two or more methods by name; the answer is the first's, with those of the others in it."""

    methods: tuple[tuple[str, Method], ...]

    @property
    def name(self) -> str:  # type: ignore[override]
        return self.methods[0][0]

    @property
    def others(self) -> dict[str, Method]:
        """All but the first."""
        return dict(self.methods[1:])

    @property
    def gradient(self) -> str:  # type: ignore[override]
        return next((each.gradient for _, each in self.methods if each.gradient == Method.gradient), "none")

    @property
    def online(self) -> bool:  # type: ignore[override]
        return any(each.online for _, each in self.methods)

    @property
    def capturable(self) -> bool:
        return all(each.capturable for _, each in self.methods)

    @property
    def keeps_activations(self) -> bool:
        return any(each.keeps_activations for _, each in self.methods)

    def check(self, n_views: int) -> None:
        for _, each in self.methods:
            each.check(n_views)

    def prepare(self, classes: Classes) -> None:
        for _, each in self.methods:
            each.prepare(classes)

    def __call__(self, images: Tensor, classes: Classes, stages: Stages) -> Answer:
        answers = {name: each(images, classes, stages) for name, each in self.methods}
        first = answers.pop(self.name)
        return replace(first, others=answers)

    def state(self) -> dict[str, Tensor]:
        return {f"{of}/{name}": value for of, each in self.methods for name, value in each.state().items()}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        for of, each in self.methods:
            begin = f"{of}/"
            each.load_state({name[len(begin) :]: value for name, value in state.items() if name.startswith(begin)})
