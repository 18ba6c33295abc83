"""The package's ops: typed wrappers around ``torch.ops.tpt_fast``, one file each."""

from ._library import build_info
from .adamw_step import AdamWState, adamw_step
from .add_layer_norm import add_layer_norm
from .augmix import augmix
from .bias_act import bias_act, bias_act_
from .linear import linear, panels
from .objective import Objective, objective
from .prefix_attention import prefix_attention
from .views import views

__all__ = [
    "AdamWState",
    "Objective",
    "adamw_step",
    "add_layer_norm",
    "augmix",
    "bias_act",
    "bias_act_",
    "build_info",
    "linear",
    "objective",
    "panels",
    "prefix_attention",
    "views",
]
