"""An ensemble of prompts (Radford et al., ICML 2021, section 3.1.4)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from .._fields import described
from .._stages import Stages
from ..text.classes import Classes
from ..text.templates import Templates, read_templates
from . import Answer, Method
from .zero_shot import zero_shot


@dataclass(frozen=True)
class Ensemble(Method):
    """The plain image, and for each class the mean of the features of many prompts, encoded once."""

    name: ClassVar[str] = "ensemble"
    paper: ClassVar[str] = "Radford et al., ICML 2021"
    tunes: ClassVar[str] = "nothing"
    gradient: ClassVar[str] = "none"

    templates: Templates = described('A list of prompts with "{}" for the name; "openai": 80; "simple": 7.', "openai")

    def __post_init__(self) -> None:
        object.__setattr__(self, "templates", read_templates(self.templates))
        if self.templates is None:
            raise TypeError("templates: expected a list of strings or the name of one, got None")

    def prepare(self, classes: Classes) -> None:
        classes.prototypes(self.templates)

    def __call__(self, images: Tensor, classes: Classes, stages: Stages) -> Answer:
        with stages("predict"):
            logits = classes.logits(classes.scaled(images[:, :1]), classes.prototypes(self.templates))[:, 0]
        return Answer(logits, zero_shot(images, classes))
