"""Figures of the papers, to stand beside ours: what is not here could not be read, and is not quoted from memory.

Top-1 accuracy, and the calibration error where it was printed, in percent. TPT's and the prompts' are of its paper (Shu
et al., NeurIPS 2022); C-TPT's and O-TPT's, and the calibration of TPT, of O-TPT's README, which quotes the earlier two;
TDA's of its README.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple

from ..config import TuneConfig
from ..methods import METHODS
from ..methods.published_settings import DATA_SETS, published_settings
from .several import methods_of

SHIFTS = ("imagenet", "imagenet_a", "imagenet_v2", "imagenet_r", "imagenet_sketch")
FINE_GRAINED = (
    "dtd", "flowers102", "food101", "sun397", "aircraft", "pets", "caltech101", "ucf101", "eurosat", "cars",
)  # fmt: skip


class Published(NamedTuple):
    """What a paper printed, in percent."""

    top1: float
    ece: float | None  #: of 20 bins
    source: str


def _row(source: str, sets: tuple[str, ...], top1: str, ece: str = "") -> dict[str, Published]:
    calibration: list[float | None] = [float(each) if each != "-" else None for each in ece.split()]
    calibration = calibration or [None] * len(sets)
    return {
        name: Published(float(one), error, source)
        for name, one, error in zip(sets, top1.split(), calibration, strict=True)
    }


_TPT, _OTPT, _TDA = "TPT, table 1", "O-TPT, README", "TDA, README"

#: (architecture, method) -> set -> figure. "Zero-shot" is the prompt "a photo of a".
FIGURES: dict[tuple[str, str], dict[str, Published]] = {
    ("RN50", "zero_shot"): _row(_TPT, SHIFTS, "58.16 21.83 51.41 56.15 33.37"),
    ("RN50", "ensemble"): _row(_TPT, SHIFTS, "59.81 23.24 52.91 60.72 35.48"),
    ("RN50", "tpt"): _row(_TPT, SHIFTS, "60.74 26.67 54.70 59.11 35.09"),
    ("RN50", "tda"): _row(_TDA, SHIFTS, "61.35 30.29 55.54 62.58 38.12")
    | _row(_TDA, FINE_GRAINED, "43.74 68.74 77.75 62.53 17.61 86.18 89.70 64.18 42.11 57.78"),
    ("ViT-B-16", "zero_shot"): _row(_TPT, SHIFTS, "66.73 47.87 60.86 73.98 46.09", "- 8.61 3.01 3.58 4.95"),
    ("ViT-B-16", "ensemble"): _row(_TPT, SHIFTS, "68.34 49.89 61.88 77.65 48.24"),
    ("ViT-B-16", "tpt"): _row(_TPT, SHIFTS, "68.98 54.77 63.45 77.06 47.94")
    # Its cells of UCF101's and EuroSAT's calibration equal C-TPT's, and do not fit its printed mean.
    | _row(
        _OTPT,
        FINE_GRAINED,
        "46.7 69.0 84.7 64.5 23.4 87.1 93.8 67.3 42.4 66.3",
        "21.2 13.5 3.98 11.3 16.8 5.77 4.51 - - 5.16",
    ),
    ("ViT-B-16", "ctpt"): _row(_OTPT, SHIFTS, "68.5 51.6 62.7 76.0 47.9", "3.15 8.16 6.23 1.54 7.35")
    | _row(
        _OTPT,
        FINE_GRAINED,
        "46.0 69.8 83.7 64.8 24.85 88.2 93.63 65.7 43.2 65.8",
        "11.9 5.04 3.43 5.04 4.36 1.9 4.24 2.54 13.2 1.59",
    ),
    ("ViT-B-16", "otpt"): _row(_OTPT, SHIFTS, "67.33 49.87 61.65 72.55 47.12", "1.96 7.22 3.97 1.46 6.87")
    | _row(
        _OTPT,
        FINE_GRAINED,
        "45.68 70.07 84.13 64.23 23.64 87.95 93.95 64.16 42.84 64.53",
        "7.88 3.87 1.46 4.93 3.68 1.9 3.8 2.34 12.98 1.78",
    ),
}


def published(set_name: str, method: str, model: str | None, pretrained: str | None) -> Published | str:
    """The figure to print beside ours, or why there is none.

    Args:
        set_name, method: as rows have them; ``method`` by its own name.
        model, pretrained: by open_clip's names.
    """
    name = plain_name(set_name)
    if name not in DATA_SETS:
        return "no paper has this set"
    if pretrained != "openai":
        return "papers have OpenAI's weights"
    architecture = (model or "").removesuffix("-quickgelu").replace("/", "-")
    if architecture not in ("RN50", "ViT-B-16"):
        return "papers have RN50 and ViT-B/16"
    row = FIGURES.get((architecture, "tpt" if method == "official" else method), {})
    return row.get(name) or "its table could not be read"


def differences(set_name: str, described: Mapping[str, Any], n_views: int, views: str) -> str:
    """In what a run was another than the paper's, as far as its options tell; "" where it was not.

    Args:
        described: the method's name as "method", and its options.
    """
    name, method = plain_name(set_name), described["method"]
    if name not in DATA_SETS or method not in METHODS:
        return ""
    wanted = published_settings(method, name)
    differs = [
        f"{option} {described[option]}, not {value}"
        for option, value in wanted.items()
        if option != "templates" and option in described and described[option] != value
    ]
    mixed = _mixed(name, method)
    if mixed is not None and n_views != 64:
        differs.append(f"{n_views} views, not 64")
    if mixed is not None and mixed != (views == "augmix"):
        differs.append("published with AugMix" if mixed else "published without AugMix")
    return ", ".join(differs)


def published_config(config: TuneConfig, set_name: str) -> TuneConfig:
    """``config`` with the views and options that the authors of its methods use on a set; as it is on other sets.

    Raises:
        ValueError: its methods' authors have other views than one another.
    """
    name = plain_name(set_name)
    if name not in DATA_SETS:
        return config
    given = methods_of(config)
    mixed = {label: _mixed(name, each.name) for label, each in given.items()}
    kinds = {each for each in mixed.values() if each is not None}
    if len(kinds) > 1:
        with_it, without = ([label for label, each in mixed.items() if each is kind] for kind in (True, False))
        raise ValueError(
            f"method: on {set_name} {', '.join(with_it)} were published with AugMix and {', '.join(without)} without: "
            "run them one after the other"
        )
    views = "augmix" if kinds == {True} else "crops" if kinds else config.views
    if config.strict_official:
        return replace(config, views=views)
    methods: Any = {
        label: replace(each, **published_settings(each.name, name))  # type: ignore[type-var]
        for label, each in given.items()
    }
    return replace(config, views=views, method=methods)


def _mixed(name: str, method: str) -> bool | None:
    """Whether a method was published with AugMix on a set; None where it looks at the plain view alone."""
    if method in ("zero_shot", "ensemble") or (method == "tda" and name not in SHIFTS[1:]):
        return None
    if name in SHIFTS:
        return name != "imagenet" and method in ("ctpt", "otpt", "tda")
    return method not in ("zero", "mta")


def plain_name(set_name: str) -> str:
    """As :data:`FIGURES` has it."""
    return set_name.lower().replace("-", "_")
