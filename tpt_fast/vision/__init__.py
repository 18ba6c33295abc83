"""The image tower: normalised views -> normalised features."""

from .encoder import ImageEncoder

__all__ = ["ImageEncoder"]
