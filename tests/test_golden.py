"""Stored answers of the published algorithm in float64 (golden/README.md), on a small CLIP drawn from a seed."""

from types import SimpleNamespace

import bounds
import numpy as np
import pytest
import torch
from golden import make

from tpt_fast import TuneConfig, Tuner, make_views

pytestmark = pytest.mark.numerics


@pytest.fixture(scope="module")
def model():
    return make.model()


@pytest.fixture(scope="module")
def drawn():
    return np.load(make.HERE / "views.npz")


@pytest.fixture(scope="module", params=make.CASES)
def case(request, model, drawn):
    """What was stored, and what rounding in float32 does to it."""
    stored = {name: torch.from_numpy(value) for name, value in np.load(make.HERE / f"{request.param}.npz").items()}
    views = make.normalised(drawn["views"])
    allowed = bounds.moved(model, lambda model: make.answer(request.param, model, views))
    allowed["zero_shot_logits"] = allowed["logits_before"]
    return SimpleNamespace(name=request.param, zero_shot_logits=stored["logits_before"][0], allowed=allowed, **stored)


@pytest.mark.parametrize("engine", ["module", "auto"])
def test_answers_are_the_stored_ones(case, engine, model, drawn):
    template, steps, given = make.CASES[case.name]
    options = {"ctx": make.given_context()} if given else {}
    config = TuneConfig(rho=make.RHO, steps=steps, lr=make.LR, ctx_init=template, engine=engine, **options)
    result = Tuner(model, make.NAMES, config).tune_views(make.normalised(drawn["views"]).float())
    assert result.status == "tuned"
    assert result.selected.tolist() == case.selected.tolist()
    bounds.assert_same_answer(result, case, case.allowed, make.LR, steps)


def test_what_rounding_does_is_little(case):
    """Or equality within it would say nothing: a hundredth of the largest would pass half precision."""
    for field in ("zero_shot_logits", "logits", "grad"):
        assert case.allowed[field] < 1e-3 * getattr(case, field).abs().max()


def test_views_are_the_stored_ones(drawn):
    views = make_views(make.PHOTO, size=make.SIZE, boxes=drawn["boxes"], order=str(drawn["order"]))
    assert torch.equal(views, make_views_of(drawn["views"]))


def make_views_of(pixels):
    """In float32, as torchvision normalises."""
    mean, std = (torch.tensor(v)[:, None, None] for v in (make.CLIP_MEAN, make.CLIP_STD))
    return (torch.from_numpy(pixels).float() / 255 - mean) / std


def test_the_script_makes_the_stored_answers(case, model, drawn):
    again = make.answer(case.name, model.double(), make.normalised(drawn["views"]))
    model.float()
    assert torch.equal(again.pop("selected"), case.selected)
    allowed = {name: 2**-25 * bound for name, bound in case.allowed.items()}  # float64 has 29 bits more
    allowed["grad"] *= 4  # as in bounds.assert_same_answer
    allowed["ctx"] = make.LR * allowed["grad"] / 1e-8  # a step is g / (|g| + 1e-8)
    for name, value in again.items():
        bounds.assert_within(value, getattr(case, name), allowed[name], name)
