"""The caller's modes and defaults are for the caller's own code."""

from contextlib import contextmanager

import models
import pytest
import torch

from tpt_fast import TextEncoder, TuneConfig, Tuner, make_views
from tpt_fast.demo import PHOTO_FOLDER

NAMES, PHOTO = ["cat", "dog", "sea lion"], PHOTO_FOLDER / "cat.jpg"


@contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


MODES = {
    "autocast to bfloat16": lambda: torch.autocast("cpu", torch.bfloat16),
    "autocast to float16": lambda: torch.autocast("cpu", torch.float16),
    "another default device": lambda: torch.device("meta"),
    "float64 by default": lambda: default_dtype(torch.float64),
    "bfloat16 by default": lambda: default_dtype(torch.bfloat16),
    "inference mode": torch.inference_mode,
    "no gradients": torch.no_grad,
}


@pytest.fixture(scope="module")
def model():
    return models.clip()


def features_and_gradient(encoder):
    ctx = encoder.ctx_init.clone().requires_grad_()
    features = encoder.encode(ctx)
    features.square().sum(0)[:3].sum().backward()
    return features.detach(), ctx.grad


@pytest.mark.parametrize("options", [{}, {"engine": "module"}, {"steps": 2}, {"n_ctx": 3}, {"precision": "bf16"}])
@pytest.mark.parametrize("mode", MODES)
def test_the_answer_is_the_same(model, mode, options):
    config = TuneConfig(n_views=8, rho=0.3, **options)
    want = Tuner(model, NAMES, config)(PHOTO)
    with MODES[mode]():
        inside = Tuner(model, NAMES, config)
        results = [inside(PHOTO), *inside.map([PHOTO])]
    for result in (*results, inside(PHOTO)):
        assert all(torch.equal(getattr(result, name), getattr(want, name)) for name in ("logits", "ctx", "selected"))


@pytest.mark.parametrize("engine", ["packed", "module"])
@pytest.mark.parametrize("mode", MODES)
def test_an_encoder_made_inside_can_be_trained_outside(model, mode, engine):
    want = features_and_gradient(TextEncoder(model, NAMES, engine=engine))
    with MODES[mode]():
        encoder = TextEncoder(model, NAMES, engine=engine)
    assert all(map(torch.equal, features_and_gradient(encoder), want))
    if "autocast" in mode:
        with MODES[mode]():
            assert all(map(torch.equal, features_and_gradient(encoder), want))


@pytest.mark.parametrize("mode", MODES)
def test_views(mode):
    want = make_views(PHOTO, 8, 64)
    with MODES[mode]():
        assert torch.equal(make_views(PHOTO, 8, 64), want)
