"""Products with a tower's weights: torch's or our own, the answers are the same."""

import copy
import gc

import bounds
import models
import pytest
import torch
from torch.nn.functional import gelu

from tpt_fast import TuneConfig, Tuner
from tpt_fast.models import matrix, products
from tpt_fast.models.matrix import Matrix

pytestmark = pytest.mark.numerics


@pytest.fixture(params=[True, False], ids=["own", "torch"])
def own(request, monkeypatch):
    monkeypatch.setattr(products, "own_is_faster", lambda dtype: request.param)
    return request.param


def close(got, x, weight, bias=None):
    """To x @ weight.T + bias."""
    want = x.double() @ weight.double().t() + (0 if bias is None else bias.double())
    bounds.assert_rounded(got, want, bounds.product(x, weight, bias))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [(0, 32), (16, 48), (32, 50), (3, 40), (0, 50), (64, 128), (64, 131), (1, 70)])
def test_products_of_some_rows(own, rows, dtype):
    weight, x, bias = (torch.randn(*shape).to(dtype) for shape in ((131, 20), (3, 7, 20), (131,)))
    whole, part = Matrix(weight).lay_out(backward=True), slice(*rows)
    some, exact = whole.rows(*rows), weight[part]
    assert some.weight.data_ptr() == weight[part].data_ptr()
    close(some.project(x), x, exact)
    close(some.project(x, bias[part]), x, exact, bias[part])
    truth = x.double() @ exact.double().t() + bias[part]
    allowed = 1.2 * bounds.product(x, exact, bias[part]) + bounds.activation(truth, x.dtype)
    if dtype == torch.bfloat16 and not own:  # torch's product is rounded before it is activated
        allowed = allowed + 1.2 * bounds.roundoff(dtype) * truth.abs().add(bias[part].double().abs())
    bounds.assert_rounded(some.activate(x, bias[part].float(), "gelu"), gelu(truth), allowed)
    grad = torch.randn(3, 7, rows[1] - rows[0]).to(dtype)
    close(some.back(grad), grad, exact.t())
    close(whole.project(x, bias), x, weight, bias)
    with_panels = some.panels is not None and some.turned is not None
    assert with_panels == own


def test_without_backward_nothing_is_laid_out_for_it(own):
    weight = torch.randn(20, 30)
    grad = torch.randn(4, 20)
    plain = Matrix(weight).lay_out()
    assert plain.turned is None
    close(plain.back(grad), grad, weight.t())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_other_types_are_torchs(dtype, monkeypatch):
    monkeypatch.setenv("TPT_FAST_PRODUCT", "own")
    weight, x = torch.randn(20, 30).to(dtype), torch.randn(4, 30).to(dtype)
    held = Matrix(weight).lay_out(backward=True)
    assert held.panels is held.turned is None
    assert torch.equal(held.project(x), x @ weight.t())


def test_copies_are_shared_and_freed(monkeypatch):
    monkeypatch.setattr(products, "own_is_faster", lambda dtype: True)
    gc.collect()
    before, weight = len(matrix._laid_out), torch.randn(40, 24)
    one, other = Matrix(weight).lay_out(backward=True), Matrix(weight.detach()).lay_out(backward=True)
    assert one.panels is other.panels
    assert one.turned is other.turned
    assert len(matrix._laid_out) == before + 2
    weight.data[3, 5] += 1  # without a trace in its version
    late = Matrix(weight).lay_out()
    assert late.panels is not one.panels
    close(late.project(torch.eye(24)), torch.eye(24), weight)
    assert not torch.equal(one.project(torch.eye(24)), late.project(torch.eye(24)))
    del one, other, late
    gc.collect()
    assert len(matrix._laid_out) == before


@pytest.mark.parametrize("layers", [1, 3])
def test_a_tuner_answers_the_same(monkeypatch, layers):
    """Widths that panels of 16 cut and widths that they do not."""
    vision = {"layers": layers, "width": 72, "head_width": 36}
    model = models.clip(seed=2, embed=24, vision=vision, text={"layers": layers, "width": 40})
    views = torch.randn(16, 3, 32, 32)
    names, results = ["cat", "sea lion", "dog"], []
    for answer in (True, False):
        monkeypatch.setattr(products, "own_is_faster", lambda dtype, known=answer: known)
        config = TuneConfig(n_views=16, rho=0.25)
        results.append(Tuner(copy.deepcopy(model), names, config).tune_views(views))
    ours, theirs = results
    allowed = bounds.answers(model, views, names, rho=0.25)
    bounds.assert_same_answer(ours, theirs, allowed)
    assert not torch.equal(ours.entropies, theirs.entropies)  # or one product would have answered both
