"""The text tower: prompts in, normalised text features out, differentiable in the context.

``encoder`` has the public class and decides which engine runs; ``module`` runs the model's own code; ``packed``
computes what all classes share once; ``memory`` says how much of it fits.
"""

from .encoder import TextEncoder

__all__ = ["TextEncoder"]
