"""A small CLIP that ships with the package, so that everything can be tried at once, without a download.

A real open_clip ``CLIP`` for small images, trained on a hundred everyday classes of Tiny ImageNet by ``recipes/demo``.
Importing this module is cheap; ``load`` imports open_clip.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from open_clip import CLIP, SimpleTokenizer


class Class(NamedTuple):
    """A line of ``classes.tsv``: WordNet id, name, other names, and the kinds of things it is, from narrow to wide."""

    wnid: str
    name: str
    synonyms: tuple[str, ...]
    kinds: tuple[str, ...]


def _classes() -> tuple[Class, ...]:
    lines = (Path(__file__).parent / "classes.tsv").read_text(encoding="utf-8").splitlines()[1:]
    fields = (line.split("\t") for line in lines)
    return tuple(
        Class(w, name, tuple(others.split(", ")), tuple(kinds.split(", "))) for w, name, others, kinds in fields
    )


CLASSES = _classes()
CLASSNAMES = tuple(c.name for c in CLASSES)
WNIDS = tuple(c.wnid for c in CLASSES)

PHOTO_FOLDER = Path(__file__).parent / "photos"
PHOTOS = {
    "dam.jpg": "dam",
    "red_panda.jpg": "red panda",
    "coffee.jpg": "espresso",
    "koala.jpg": "koala",
    "german_shepherd.jpg": "German shepherd",
    "goldfish.jpg": "goldfish",
    "arch.jpg": "triumphal arch",
    "bee.jpg": "bee",
}
"""Photographs in ``PHOTO_FOLDER`` and which of ``CLASSNAMES`` each shows. Sources in its README.md.

Tuning corrects the first; the last stays wrong. The folder holds more, which tests and benchmarks read.
"""


class Demo(NamedTuple):
    """What ``load`` returns. ``preprocess``: open_clip's size, mean, std, interpolation, resize_mode, fill_color."""

    model: CLIP
    tokenizer: SimpleTokenizer
    preprocess: dict[str, Any]
    classnames: tuple[str, ...]


def load() -> Demo:
    """The demo model on the CPU, float32, in eval mode; no network, and the random generators stay as they are.

    Images are 64 x 64, normalised with ``model.visual.image_mean`` and ``image_std``; text is at most 77 tokens of the
    usual CLIP vocabulary. Raises ``FileNotFoundError`` where the weights are missing.
    """
    from open_clip import SimpleTokenizer
    from open_clip.model import set_model_preprocess_cfg
    from open_clip.transform import PreprocessCfg

    from . import weights

    model = weights.load_weights(weights.build(weights.read_config())).eval().requires_grad_(False)
    preprocess = vars(PreprocessCfg(size=model.visual.image_size))
    set_model_preprocess_cfg(model, preprocess)
    return Demo(model, SimpleTokenizer(), preprocess, CLASSNAMES)
