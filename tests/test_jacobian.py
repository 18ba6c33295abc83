"""The first gradient as one matrix product: the same numbers as by a backward pass, with less in memory and in time."""

import pytest
import torch
from method_cases import NAMES, small_clip, view_features

from tpt_fast import TextEncoder, TuneConfig, Tuner
from tpt_fast.methods import Tpt
from tpt_fast.prompting import CoCoOp
from tpt_fast.text import jacobian

DIFFERENT = list(dict.fromkeys(NAMES))


@pytest.fixture(scope="module")
def model():
    return small_clip()


@pytest.mark.numerics
@pytest.mark.parametrize("engine", ["packed", "module"])
@pytest.mark.parametrize("specific", [False, True])
def test_gradients_are_those_of_a_backward_pass(model, engine, specific):
    ctx = torch.randn(4, 64, generator=torch.Generator().manual_seed(1)) * 0.05
    ctx = ctx + torch.arange(4.0)[:, None, None] * 0.01 if specific else ctx
    encoder = TextEncoder(model, DIFFERENT, ctx=ctx, engine=engine)
    features, tape = encoder.initial()
    grads = torch.randn(3, *features.shape, generator=torch.Generator().manual_seed(2))
    want = encoder.backward(tape, grads)
    seen = []
    encoder.keep_jacobian(lambda steps: (seen.append(step) or step for step in steps))
    assert seen == list(range(features.shape[1]))
    kept, tape = encoder.initial()
    assert torch.equal(kept, features)
    assert isinstance(tape, jacobian.Jacobian)
    got = encoder.backward(tape, grads)
    assert got.shape == want.shape == (3, *ctx.shape)
    # Sums of classes and features, each of float32 numbers that a tower of 2 blocks has rounded.
    assert (got - want).abs().max() < 1e-4 * want.abs().max()
    assert (encoder.backward(tape, grads[1]) - want[1]).abs().max() < 1e-4 * want.abs().max()


@pytest.mark.parametrize("method", ["tpt", "ctpt", "rtpt"])
@pytest.mark.parametrize("steps", [1, 2])
def test_answers_are_the_same(model, method, steps):
    config = TuneConfig(n_views=24, rho=0.25, steps=steps, method=method)
    features, plain, tuner = view_features(), Tuner(model, NAMES, config), Tuner(model, NAMES, config)
    tuner.keep_jacobian()
    for got, want in zip(tuner.tune_features(features), plain.tune_features(features), strict=True):
        assert got.selected.tolist() == want.selected.tolist()
        assert (got.grad - want.grad).abs().max() < 1e-4 * want.grad.abs().max()
        clear = want.grad.abs() > 1e-3 * want.grad.abs().max()
        assert (got.ctx - want.ctx)[clear].abs().max() < 1e-5
        assert torch.equal(got.zero_shot_logits, want.zero_shot_logits)


def test_what_it_holds_and_how_long(model):
    tuner = Tuner(model, NAMES, TuneConfig(n_views=24))
    before = tuner.memory()["kept activations"].own
    tuner.keep_jacobian()
    wide, entries = 32, 4 * 64
    assert tuner.memory()["kept activations"].own == 4 * len(DIFFERENT) * wide * (1 + entries) != before
    tuner.set_classnames(["cat", "dog"])
    assert not isinstance(tuner.classes.text.initial()[1], jacobian.Jacobian)


def test_messages(model, monkeypatch):
    with pytest.raises(ValueError, match="first backward pass; no gradient goes to a context"):
        Tuner(model, NAMES, TuneConfig(method="zero")).keep_jacobian()
    net = CoCoOp(torch.zeros(4, 64), torch.ones(8, 32), torch.zeros(8), torch.ones(64, 8), torch.zeros(64))
    with pytest.raises(ValueError, match="each image starts from a context of its own"):
        Tuner(model, NAMES, TuneConfig(ctx=net)).keep_jacobian()
    monkeypatch.setattr(jacobian, "free_bytes", lambda device: 1000)
    tuner = Tuner(model, NAMES, TuneConfig(method=Tpt()))
    with pytest.raises(ValueError, match=r"of 4 classes, 32 features and 256 numbers of context it takes 0\.000131 GB"):
        tuner.keep_jacobian()
    assert tuner.tune_features(view_features()[0]).status == "tuned"
