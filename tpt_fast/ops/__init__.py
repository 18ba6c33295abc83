"""The package's ops: typed wrappers around ``torch.ops.tpt_fast``, one file each."""

from .objective import Objective, objective

__all__ = ["Objective", "objective"]
