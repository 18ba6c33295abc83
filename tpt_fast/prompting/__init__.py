"""Prompts that were learned elsewhere."""

from .cocoop import CoCoOp
from .coop import load_ctx

__all__ = ["CoCoOp", "load_ctx"]
