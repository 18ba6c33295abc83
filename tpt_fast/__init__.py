"""Test-time prompt tuning of CLIP, exact and fast.

>>> import open_clip, tpt_fast
>>> model, _, _ = open_clip.create_model_and_transforms("ViT-B-16-quickgelu", pretrained="openai")
>>> tpt_fast.tune(model, "photo.jpg", ["cat", "dog", "horse"]).label
"""

from importlib.metadata import PackageNotFoundError, version

from ._jit import BackendWarning, BuildError
from .config import TuneConfig
from .images import load_image
from .result import Prediction, TuneResult
from .text import TextEncoder
from .tuner import Tuner, tune
from .views import draw_boxes, make_views

try:
    __version__ = version("tpt_fast")
except PackageNotFoundError:  # run from a checkout that is not installed
    __version__ = "0+unknown"

__all__ = [
    "BackendWarning",
    "BuildError",
    "Prediction",
    "TextEncoder",
    "TuneConfig",
    "TuneResult",
    "Tuner",
    "draw_boxes",
    "load_image",
    "make_views",
    "tune",
]
