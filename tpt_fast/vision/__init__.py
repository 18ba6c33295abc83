"""The image tower: normalised views -> normalised features."""

from ..models.preprocessing import Preprocessing, preprocessing
from .encoder import ImageEncoder

__all__ = ["ImageEncoder", "Preprocessing", "preprocessing"]
