"""TuneConfig: the paper's defaults, and a message for each bad value."""

import dataclasses

import pytest

from tpt_fast import TuneConfig


def test_defaults_are_the_papers():
    config = TuneConfig()
    got = (config.n_views, config.rho, config.steps, config.lr, config.weight_decay, config.ctx_init)
    assert got == (64, 0.1, 1, 5e-3, 0.01, "a photo of a")
    assert config.n_selected(64) == 6


def test_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        TuneConfig().rho = 0.2


def test_at_least_one_view_is_kept_unless_official():
    assert TuneConfig(n_views=8).n_selected(8) == 1
    with pytest.raises(ValueError, match=r"rho: int\(8 views \* 0.1\) keeps none"):
        TuneConfig(n_views=8, strict_official=True)


@pytest.mark.parametrize(
    ("option", "error", "message"),
    [
        ({"n_views": 1}, ValueError, "n_views: expected 2 or more, got 1"),
        ({"n_views": 2.0}, TypeError, "n_views: expected an int, got float 2.0"),
        ({"rho": 0}, ValueError, r"rho: expected a number in \(0, 1\], got 0"),
        ({"rho": 1.5}, ValueError, r"rho: expected a number in \(0, 1\], got 1.5"),
        ({"rho": float("nan")}, ValueError, "rho: expected .* got nan"),
        ({"rho": "0.1"}, TypeError, "rho: expected .* got str '0.1'"),
        ({"steps": -1}, ValueError, "steps: expected 0 or more, got -1"),
        ({"lr": -1.0}, ValueError, "lr: expected a number of 0 or more, got -1.0"),
        ({"weight_decay": -1.0}, ValueError, "weight_decay: expected"),
        ({"ctx_init": 3}, TypeError, "ctx_init: expected a string, got int"),
        ({"n_ctx": 0}, ValueError, "n_ctx: expected 1 or more, got 0"),
        ({"ctx": [1.0]}, TypeError, "ctx: expected a tensor or the path of a CoOp checkpoint, got list"),
        ({"precision": "int8"}, ValueError, "precision: expected one of fp32, fp16, bf16, auto, got 'int8'"),
        ({"seed": -1}, ValueError, "seed: expected 0 to 18446744073709551615, got -1"),
        ({"seed": 2**64}, ValueError, "seed: expected 0 to"),
        ({"decoder": "jpeg"}, ValueError, "decoder: expected one of pillow, torchvision, got 'jpeg'"),
        ({"strict_official": "false"}, TypeError, "strict_official: expected True or False, got str 'false'"),
        ({"cuda_graphs": 1}, TypeError, "cuda_graphs: expected True or False, got int 1"),
        ({"engine": "magic"}, ValueError, "engine: expected one of auto, packed, module, got 'magic'"),
    ],
)
def test_messages(option, error, message):
    with pytest.raises(error, match=message):
        TuneConfig(**option)
