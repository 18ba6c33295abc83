"""The package's ops: typed wrappers around ``torch.ops.tpt_fast``, one file each."""

from ._library import build_info
from .objective import Objective, objective

__all__ = ["Objective", "build_info", "objective"]
