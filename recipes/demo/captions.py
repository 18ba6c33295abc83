"""What the demo model is told about its training images.

A caption names the class (by one of its synonyms) and, in half of the cases, how the photograph looks. The look is
really there in the image (see ``augment.py``), so the words around the class name carry meaning and tuning them can
change the answer, which is what test-time prompt tuning lives on.
"""

from __future__ import annotations

import torch
from torch import Tensor

PROMPT = "a photo of a {}."

SYNONYMS: dict[str, tuple[str, ...]] = {
    "airplane": ("plane", "jet", "aircraft", "airliner"),
    "automobile": ("car", "sedan", "motor car"),
    "bird": ("songbird", "small bird"),
    "cat": ("kitten", "kitty", "house cat"),
    "deer": ("stag", "doe", "elk"),
    "dog": ("puppy", "hound", "doggy"),
    "frog": ("toad", "tree frog"),
    "horse": ("pony", "mare", "stallion"),
    "ship": ("boat", "vessel", "cargo ship"),
    "truck": ("lorry", "semi truck", "fire truck"),
}

# fmt: off
GENERIC = (
    PROMPT, "a photo of the {}.", "a photo of my {}.", "a photo of one {}.", "a picture of a {}.", "an image of a {}.",
    "a cropped photo of a {}.", "a close-up photo of a {}.", "a small photo of a {}.", "a photo of a small {}.",
    "a photo of a large {}.", "a photograph of a {}.", "a snapshot of a {}.", "this is a {}.", "there is a {}.", "{}.",
)
# fmt: on

LOOKS: dict[str, tuple[str, ...]] = {
    "clear": ("a good photo of a {}.", "a clear photo of a {}.", "a sharp photo of a {}.", "a clean photo of a {}."),
    "blurry": ("a blurry photo of a {}.", "a blurred picture of a {}.", "a photo of a blurry {}."),
    "noisy": ("a noisy photo of a {}.", "a grainy picture of a {}.", "a bad photo of a {}."),
    "dark": ("a dark photo of a {}.", "a dim picture of a {}.", "a black photo of a {}."),
    "bright": ("a bright photo of a {}.", "a pale picture of a {}.", "a white photo of a {}."),
}


def names_of(classname: str) -> tuple[str, ...]:
    """The class name and its synonyms, the class name first."""
    return (classname, *SYNONYMS.get(classname, ()))


def all_captions(classnames: tuple[str, ...]) -> list[str]:
    """Every caption that ``sample`` can return; their tokens are the only ones the model ever learns."""
    templates = [*GENERIC, *(t for looks in LOOKS.values() for t in looks)]
    return [t.format(name) for t in templates for c in classnames for name in names_of(c)]


def sample(classnames: tuple[str, ...], generic_sets: int, generator: torch.Generator) -> list[str]:
    """Captions for one training step, class-major within each set: ``(generic_sets + len(LOOKS)) * C`` strings.

    A set holds one caption of each class, template and synonym drawn independently for each, so that only the name
    tells the classes of a set apart.
    """
    sets = [GENERIC] * generic_sets + list(LOOKS.values())
    return [_draw(templates, generator).format(_draw(names_of(c), generator)) for templates in sets for c in classnames]


def sample_looks(classnames: tuple[str, ...], generator: torch.Generator) -> list[list[str]]:
    """A caption of each class for each look, [looks][C]. One look's captions share a template: they are one prompt."""
    return [of_classes(_draw(templates, generator), classnames, generator) for templates in LOOKS.values()]


def of_classes(template: str, classnames: tuple[str, ...], generator: torch.Generator | None = None) -> list[str]:
    """One caption a class; with a generator, some of the names are synonyms."""
    return [template.format(_draw(names_of(c), generator) if generator else c) for c in classnames]


def _draw(options: tuple[str, ...], generator: torch.Generator) -> str:
    """The first option, the canonical one, is drawn 40 % of the time; the others share the rest."""
    draws: Tensor = torch.rand(2, generator=generator)
    if len(options) == 1 or draws[0] < 0.4:
        return options[0]
    return options[1 + int(draws[1] * (len(options) - 1))]
