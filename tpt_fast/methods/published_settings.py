"""What the authors set for each data set, where that is not their method's default; see :func:`published_settings`.

Read from the scripts and configurations of C-TPT 085e6c2, O-TPT a09933f and TDA e697fb0. The other methods set nothing
for single data sets. Of templates only lists that open_clip has are here: a name that is not in the table leaves the
one prompt of ctx_init, where TDA has one written by hand.
"""

from __future__ import annotations

from typing import Any

from .._checks import check_choice
from . import method_class

_SHIFTS = ("imagenet_a", "imagenet_v2", "imagenet_r", "imagenet_sketch")
_FINE_GRAINED = (
    "flowers102", "dtd", "pets", "cars", "ucf101", "caltech101", "food101", "sun397", "aircraft", "eurosat",
)  # fmt: skip

#: All names of data sets.
DATA_SETS = ("imagenet", *_SHIFTS, *_FINE_GRAINED)


def _tda(alpha: float, beta: float, templates: str | None = None, plain_view: bool = True) -> dict[str, Any]:
    return {"positive_alpha": alpha, "positive_beta": beta, "templates": templates, "plain_view": plain_view}


#: Method -> data set -> options of the method.
SETTINGS: dict[str, dict[str, dict[str, Any]]] = {
    "ctpt": {name: {"lambda_term": 20.0} for name in _SHIFTS},
    "otpt": {name: {"lambda_term": 2.0} for name in _SHIFTS},
    "tda": {
        "imagenet": _tda(2.0, 5.0, "simple"),
        "imagenet_a": _tda(2.0, 5.0, "simple", plain_view=False),
        "imagenet_v2": _tda(1.0, 8.0, "simple", plain_view=False),
        "imagenet_r": _tda(1.0, 8.0, "openai", plain_view=False),
        "imagenet_sketch": _tda(2.363, 7.45, "openai", plain_view=False),
        "caltech101": _tda(5.0, 5.0, "simple"),
        "dtd": _tda(2.0, 3.0),
        "eurosat": _tda(4.0, 8.0),
        "aircraft": _tda(2.0, 2.0),
        "food101": _tda(1.0, 1.0),
        "flowers102": _tda(1.0, 5.0),
        "pets": _tda(2.0, 7.0),
        "cars": _tda(1.0, 7.0, "simple"),
        "sun397": _tda(2.0, 3.0, "simple"),
        "ucf101": _tda(3.0, 8.0),
    },
}


_MIXED_ON = {
    **dict.fromkeys(("tpt", "official", "tps", "rtpt"), _FINE_GRAINED),
    **dict.fromkeys(("ctpt", "otpt"), _SHIFTS + _FINE_GRAINED),
    "tda": _SHIFTS,
}


def published_views(method: str, data_set: str) -> str:
    """``views`` of :class:`tpt_fast.TuneConfig` as authors of ``method`` have it on ``data_set``: "crops" or "augmix".

    Raises:
        ValueError: as for :func:`published_settings`.
    """
    method_class(method)
    check_choice("data_set", data_set, tuple(DATA_SETS))
    return "augmix" if data_set in _MIXED_ON.get(method, ()) else "crops"


def published_settings(method: str, data_set: str) -> dict[str, Any]:
    """Options that the authors of ``method`` use on ``data_set``: ``Tda(**published_settings("tda", "cars"))``.

    Raises:
        ValueError: an unknown method, or a data set that is none of :data:`DATA_SETS`.
    """
    method_class(method)
    check_choice("data_set", data_set, tuple(DATA_SETS))
    return dict(SETTINGS.get(method, {}).get(data_set, {}))
