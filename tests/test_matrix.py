"""Products with a tower's weights: torch's or our own, the answers are the same."""

import copy
import gc

import open_clip
import pytest
import torch
from torch.nn.functional import gelu

from tpt_fast import TuneConfig, Tuner
from tpt_fast.models import matrix
from tpt_fast.models.matrix import Matrix


@pytest.fixture(params=[True, False], ids=["own", "torch"])
def own(request, monkeypatch):
    monkeypatch.setattr(matrix, "own_product_is_faster", lambda: request.param)
    return request.param


def close(got, want):
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bounds", [(0, 32), (16, 48), (32, 50), (3, 40), (0, 50)])
def test_products_of_some_rows(own, bounds):
    torch.manual_seed(0)
    weight, x, bias = torch.randn(50, 20), torch.randn(3, 7, 20), torch.randn(50)
    whole, part = Matrix(weight).lay_out(backward=True), slice(*bounds)
    some, exact = whole.rows(*bounds), weight[part].double()
    assert some.weight.data_ptr() == weight[part].data_ptr()
    close(some.project(x), x.double() @ exact.t())
    close(some.project(x, bias[part]), x.double() @ exact.t() + bias[part])
    close(some.activate(x, bias[part], "gelu"), gelu(x.double() @ exact.t() + bias[part]))
    grad = torch.randn(3, 7, bounds[1] - bounds[0])
    close(some.back(grad), grad.double() @ exact)
    close(whole.project(x, bias), x.double() @ weight.double().t() + bias)
    with_panels = some._panels is not None and some._turned is not None
    assert with_panels == own


def test_without_backward_nothing_is_laid_out_for_it(own):
    weight = torch.randn(20, 30)
    grad = torch.randn(4, 20)
    plain = Matrix(weight).lay_out()
    assert plain._turned is None
    close(plain.back(grad), grad.double() @ weight.double())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_other_types_are_torchs(dtype, monkeypatch):
    monkeypatch.setattr(matrix, "own_product_is_faster", lambda: True)
    weight, x = torch.randn(20, 30).to(dtype), torch.randn(4, 30).to(dtype)
    held = Matrix(weight).lay_out(backward=True)
    assert held._panels is held._turned is None
    assert torch.equal(held.project(x), x @ weight.t())


def test_copies_are_shared_and_freed(monkeypatch):
    monkeypatch.setattr(matrix, "own_product_is_faster", lambda: True)
    gc.collect()
    before, weight = len(matrix._laid_out), torch.randn(40, 24)
    one, other = Matrix(weight).lay_out(backward=True), Matrix(weight.detach()).lay_out(backward=True)
    assert one._panels is other._panels
    assert one._turned is other._turned
    assert len(matrix._laid_out) == before + 2
    weight.data[3, 5] += 1  # without a trace in its version
    late = Matrix(weight).lay_out()
    assert late._panels is not one._panels
    close(late.project(torch.eye(24)), weight.double().t())
    assert not torch.equal(one.project(torch.eye(24)), late.project(torch.eye(24)))
    del one, other, late
    gc.collect()
    assert len(matrix._laid_out) == before


def test_torchs_product_where_ours_is_not_known_to_be_faster(monkeypatch):
    for capability, cpu, answer in (
        ("AVX2", "AMD EPYC", True),
        ("AVX512", "AMD EPYC", False),
        ("AVX2", "Intel Xeon", False),
    ):
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda known=capability: known)
        monkeypatch.setattr(matrix, "cpu_name", lambda name=cpu: name)
        monkeypatch.setattr(matrix.load, "ensure", lambda: matrix.load.Backend("native"))
        assert matrix.own_product_is_faster.__wrapped__() == answer
    monkeypatch.setattr(matrix.load, "ensure", lambda: matrix.load.Backend("reference"))
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    monkeypatch.setattr(matrix, "cpu_name", lambda: "AMD EPYC")
    assert not matrix.own_product_is_faster.__wrapped__()


@pytest.mark.parametrize("layers", [1, 3])
def test_a_tuner_answers_the_same(monkeypatch, layers):
    """Widths that panels of 16 cut and widths that they do not."""
    torch.manual_seed(2)
    vision = {"image_size": 32, "layers": layers, "width": 72, "patch_size": 8, "head_width": 36}
    text = {"context_length": 77, "vocab_size": 49408, "width": 40, "heads": 2, "layers": layers}
    model = open_clip.model.CLIP(24, vision, text).eval()
    views = torch.randn(16, 3, 32, 32)
    results = []
    for answer in (True, False):
        monkeypatch.setattr(matrix, "own_product_is_faster", lambda known=answer: known)
        config = TuneConfig(n_views=16, rho=0.25)
        results.append(Tuner(copy.deepcopy(model), ["cat", "sea lion", "dog"], config).tune_views(views))
    ours, theirs = results
    assert torch.equal(ours.selected.sort().values, theirs.selected.sort().values)
    for name in ("logits", "zero_shot_logits", "entropies", "ctx"):
        torch.testing.assert_close(getattr(ours, name), getattr(theirs, name), rtol=1e-4, atol=1e-4)
    assert not torch.equal(ours.entropies, theirs.entropies)  # or one product would have answered both
