"""What the tests of methods share: a class list, the features of some images' views, Tuners."""

import models
import torch

from tpt_fast import TuneConfig, Tuner
from tpt_fast.methods import METHODS, method_class, method_options

NAMES = ["cat", "dog", "sports car", "goldfish", "dog"]  # one comes twice
FEW = {"n_views": 24, "rho": 0.25}
METHODS_HERE = [name for name in METHODS if name != "official"]


def small_clip():
    return models.clip(std=0.15)


def view_features():
    """Of the views of three images."""
    generator = torch.Generator().manual_seed(2)
    around = torch.randn(3, 1, 32, generator=generator) + 0.8 * torch.randn(3, 24, 32, generator=generator)
    return torch.nn.functional.normalize(around, dim=-1)


def make(model, method, names=NAMES, **options):
    """With a quarter of the views kept, where a method given by name keeps a part of them."""
    by_name = [method] if isinstance(method, str) and method in METHODS else method if isinstance(method, list) else []
    keeps = any("rho" in method_options(method_class(name)) for name in by_name)
    return Tuner(model, names, TuneConfig(**(FEW if keeps else {"n_views": 24}), **options, method=method))


def close(got, want, bound=1e-5):
    assert (got - want).abs().max() <= bound * max(1.0, float(want.abs().max()))
