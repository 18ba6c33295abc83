"""Test-time prompt tuning of CLIP, exact and fast.

>>> import open_clip, tpt_fast
>>> model, _, _ = open_clip.create_model_and_transforms("ViT-B-16-quickgelu", pretrained="openai")
>>> tpt_fast.tune(model, "photo.jpg", ["cat", "dog", "horse"]).label
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .cache import tune as tune
    from .config import TuneConfig as TuneConfig
    from .dense import score_map as score_map
    from .extension.load import BackendWarning as BackendWarning
    from .extension.toolkit import BuildError as BuildError
    from .plot import plot_map as plot_map
    from .prompting.concept import fit_concept as fit_concept
    from .prompting.examples import encode_examples as encode_examples
    from .prompting.saved import load_ctx as load_ctx
    from .prompting.saved import save_ctx as save_ctx
    from .prompting.train import train_cocoop as train_cocoop
    from .prompting.train import train_coop as train_coop
    from .prompting.words import nearest_words as nearest_words
    from .result import Prediction as Prediction
    from .result import TuneResult as TuneResult
    from .text import TextEncoder as TextEncoder
    from .tuner import Tuner as Tuner
    from .views.crops import draw_boxes as draw_boxes
    from .views.decode import ImageLike as ImageLike
    from .views.decode import load_image as load_image
    from .views.make import make_views as make_views

# Public name -> module. Imported when asked for: `tpt-fast --help` answers at once, and `tpt-fast doctor` also where
# torch cannot be imported.
_MODULES = {
    "BackendWarning": "extension.load",
    "BuildError": "extension.toolkit",
    "ImageLike": "views.decode",
    "Prediction": "result",
    "TextEncoder": "text",
    "TuneConfig": "config",
    "TuneResult": "result",
    "Tuner": "tuner",
    "draw_boxes": "views.crops",
    "encode_examples": "prompting.examples",
    "fit_concept": "prompting.concept",
    "load_ctx": "prompting.saved",
    "load_image": "views.decode",
    "make_views": "views.make",
    "nearest_words": "prompting.words",
    "plot_map": "plot",
    "save_ctx": "prompting.saved",
    "score_map": "dense",
    "train_cocoop": "prompting.train",
    "train_coop": "prompting.train",
    "tune": "cache",
}
_PACKAGES = ("demo", "ops")
__all__ = [*_MODULES]


def __getattr__(name: str) -> Any:
    value: Any
    if name == "__version__":
        from importlib.metadata import PackageNotFoundError, version

        try:
            value = version("tpt_fast")
        except PackageNotFoundError:  # run from a checkout that is not installed
            value = "0+unknown"
    elif name in _PACKAGES:
        value = import_module(f".{name}", __name__)
    elif name in _MODULES:
        value = getattr(import_module(f".{_MODULES[name]}", __name__), name)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_PACKAGES, "__version__"})
