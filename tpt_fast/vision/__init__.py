"""The image tower: normalised views -> normalised features."""

from .encoder import ImageEncoder
from .preprocessing import Preprocessing, preprocessing

__all__ = ["ImageEncoder", "Preprocessing", "preprocessing"]
