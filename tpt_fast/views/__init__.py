"""Pictures in, normalised views out: ``decode`` a picture, draw its ``crops``, ``make`` the views."""

from .augmix import AugMix, draw_augmix
from .crops import draw_boxes, draw_specs, view_specs
from .decode import load_image
from .make import make_views, normalisation_table, pass_order

__all__ = [
    "AugMix",
    "draw_augmix",
    "draw_boxes",
    "draw_specs",
    "load_image",
    "make_views",
    "normalisation_table",
    "pass_order",
    "view_specs",
]
