"""What the demo model is told about its training images.

A caption names the class, by one of its synonyms or by what kind of thing it is, and often how the photograph looks.
The look is really there in the image (``augment.py``), so the words around the name carry meaning and tuning them can
change the answer, which is what test-time prompt tuning lives on.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from open_clip.zero_shot_metadata import OPENAI_IMAGENET_TEMPLATES
from torch import Tensor

from tpt_fast.demo import CLASSES, Class

PROMPT = "a photo of a {}."
TEMPLATES = tuple(template("{}") for template in OPENAI_IMAGENET_TEMPLATES)

_WORDS = {
    "clear": ("good", "clean", "cool", "nice", "itap of"),
    "blurry": ("blurry", "hard to see"),
    "noisy": ("bad", "jpeg corrupted"),
    "dark": ("dark",),
    "bright": ("bright",),
    "pixelated": ("pixelated", "low resolution"),
    "grey": ("black and white",),
    "close-up": ("close-up", "cropped"),
}
LOOKS: dict[str, tuple[str, ...]] = {
    look: tuple(template for template in TEMPLATES if any(f"{word} " in template for word in words))
    for look, words in _WORDS.items()
}
"""Which of ``TEMPLATES`` are true of images of which look; ``augment.LOOKS`` in its order, then tight crops."""

GENERIC = tuple(template for template in TEMPLATES if not any(template in of_look for of_look in LOOKS.values()))
"""Those that say nothing, or what no image here shows ("a tattoo of a {}."): their words get known."""


def kinds(level: int) -> tuple[tuple[str, ...], Tensor]:
    """The K kinds of things at ``level`` 0 (narrow) or 1 (wide), and the kind of each class, int64 [C]."""
    names = tuple(dict.fromkeys(c.kinds[level] for c in CLASSES))
    return names, torch.tensor([names.index(c.kinds[level]) for c in CLASSES])


def all_captions() -> list[str]:
    """Every caption that the functions below can make; their tokens are the only ones the model ever learns."""
    names = dict.fromkeys(name for c in CLASSES for name in (c.name, *c.synonyms, *c.kinds))
    return [template.format(name) for template in TEMPLATES for name in names]


def of_classes(template: str, generator: torch.Generator | None = None) -> list[str]:
    """One caption a class; with a generator, half of the names are synonyms."""
    return [template.format(_name(c, generator) if generator else c.name) for c in CLASSES]


def draw(options: Sequence[str], generator: torch.Generator) -> str:
    """One of ``options``, all equally often."""
    return options[int(torch.randint(len(options), (), generator=generator))]


def _name(c: Class, generator: torch.Generator) -> str:
    return draw(c.synonyms, generator) if torch.rand((), generator=generator) < 0.5 else c.name
