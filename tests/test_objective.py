"""The objective op: kernel against reference in float64, edge cases, autograd, determinism, messages."""

import math

import bounds
import pytest
import torch

from tpt_fast.ops import objective
from tpt_fast.reference.objective import objective as reference

pytestmark = pytest.mark.numerics

SHAPES = [(64, 1000, 6), (1, 1, 1), (2, 1, 1), (3, 7, 3), (10, 129, 1), (17, 128, 5), (64, 37, 6), (128, 2049, 12)]


def assert_matches(logits, n_selected, selected=None):
    got = objective(logits, n_selected, selected)
    # float32 may order almost equal entropies otherwise, so the rest is compared for the views that were kept.
    want = reference(logits.double(), n_selected, got.selected)
    allowed = bounds.objective(logits, got.selected, logits.dtype)
    if selected is None:
        lowest = want[0].sort(-1).values[..., :n_selected]
        bounds.assert_within(want[0].gather(-1, got.selected), lowest, 2 * allowed[0].nan_to_num(0).max())
    for a, b, bound, what in zip((got[0], *got[2:]), (want[0], *want[2:]), allowed, ("entropy", "loss", "grad")):
        assert a.dtype == logits.dtype
        bounds.assert_rounded(a, b, bound, what)


@pytest.mark.parametrize(("views", "classes", "kept"), SHAPES)
@pytest.mark.parametrize("spread", [0.1, 3.0, 30.0])
def test_kernel_equals_reference_in_float64(views, classes, kept, spread):
    assert_matches(spread * torch.randn(views, classes), kept)


def test_float64_kernel():
    assert_matches(4 * torch.randn(9, 33, dtype=torch.float64), 4)


def test_batch_equals_one_at_a_time():
    logits = 5 * torch.randn(3, 16, 50)
    batch = objective(logits, 4)
    for i, one in enumerate(logits):
        for a, b in zip(batch, objective(one, 4)):
            assert torch.equal(a[i], b)


def test_given_selection_is_used_and_kept():
    logits, chosen = 5 * torch.randn(12, 20), torch.tensor([7, 0, 11])
    assert torch.equal(objective(logits, 3, chosen).selected, chosen)
    assert_matches(logits, 3, chosen)


def test_ties_go_to_the_lower_index():
    row = torch.randn(30)
    logits = torch.stack([row, row + 0.0, 3 * row, row, 3 * row])
    assert objective(logits, 4).selected.tolist() == [2, 4, 0, 1]


def test_a_class_of_probability_zero_adds_nothing():
    logits = torch.randn(8, 12)
    without = objective(logits, 3)
    padded = torch.cat([logits, torch.full((8, 5), -math.inf)], 1)
    got = objective(padded, 3)
    assert torch.equal(got.selected, without.selected)
    allowed = bounds.objective(logits, got.selected, logits.dtype)
    bounds.assert_within(got.entropy, without.entropy, 2 * allowed[0])
    bounds.assert_within(got.loss, without.loss, 2 * allowed[1])
    assert (got.grad[:, 12:] == 0).all()
    assert_matches(padded, 3)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_broken_view_is_kept_last(bad):
    logits = torch.randn(6, 10)
    logits[2, 4] = bad
    got = objective(logits, 5)
    assert 2 not in got.selected
    assert got.entropy[2].isnan()
    assert got.loss.isfinite()
    everything = objective(logits, 6)
    assert everything.selected[-1] == 2
    assert everything.loss.isnan()


def test_certain_views_have_entropy_and_loss_zero():
    logits = torch.full((4, 9), -200.0)
    logits[:, 3] = 200.0
    got = objective(logits, 2)
    assert got.entropy.abs().max() == 0
    assert got.loss == 0
    assert (got.grad == 0).all()


def test_non_contiguous_logits():
    logits = torch.randn(40, 64).T[::2, 3:]
    assert not logits.is_contiguous()
    for a, b in zip(objective(logits, 5), objective(logits.contiguous(), 5)):
        assert torch.equal(a, b)


def test_no_images():
    got = objective(torch.empty(0, 4, 3), 2)
    assert [list(t.shape) for t in got] == [[0, 4], [0, 2], [0], [0, 2, 3]]


@pytest.mark.long
@pytest.mark.host
def test_same_bits_on_any_number_of_threads(threads):
    logits = 5 * torch.randn(64, 1000)
    first = objective(logits, 6)
    for n in (2, 3):
        threads(n)
        for a, b in zip(objective(logits, 6), first):
            assert torch.equal(a, b)


@pytest.mark.host
def test_gradcheck():
    logits = torch.randn(2, 7, 5, dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(lambda x: objective(x, 3).loss, logits)
    torch.autograd.gradcheck(lambda x: objective(x, 3).entropy, logits)


@pytest.mark.long
def test_gradient_equals_autograd_of_the_published_formula():
    logits = (3 * torch.randn(20, 40, dtype=torch.float64)).requires_grad_()
    log_probs = logits.log_softmax(1)
    chosen = (-(log_probs.exp() * log_probs).sum(1)).argsort()[:4]
    mean = log_probs[chosen].logsumexp(0) - math.log(4)
    (want,) = torch.autograd.grad(-(mean.exp() * mean).sum(), logits)
    found = objective(logits.detach(), 4)
    allowed = bounds.objective(logits.detach(), found.selected, torch.float64)[2]
    bounds.assert_within(found.grad, want[found.selected], 2 * allowed)


@pytest.mark.host
def test_opcheck():
    op = torch.ops.tpt_fast.objective.default
    torch.library.opcheck(op, (torch.randn(5, 9, requires_grad=True), 2))
    torch.library.opcheck(op, (torch.randn(2, 5, 9), 2, torch.tensor([[0, 1], [4, 2]])))


@pytest.mark.host
@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((torch.randn(5), 1), ValueError, r"logits: expected a non-empty \[N, C\] or \[B, N, C\], got \[5\]"),
        ((torch.randn(5, 0), 1), ValueError, r"logits: expected a non-empty .* got \[5, 0\]"),
        ((torch.randn(5, 3).half(), 1), TypeError, "logits: expected float32 or float64, got torch.float16"),
        ((torch.randn(5, 3), 6), ValueError, r"n_selected: expected 1 to 5 \(the number of views\), got 6"),
        ((torch.randn(5, 3), 0), ValueError, "n_selected: expected 1 to 5 .* got 0"),
        (
            (torch.randn(5, 3), 2, torch.tensor([1])),
            ValueError,
            r"selected: expected int64 \[2\], got torch.int64 \[1\]",
        ),
    ],
)
def test_messages(arguments, error, message):
    with pytest.raises(error, match=message):
        objective(*arguments)


@pytest.mark.host
def test_the_kernel_refuses_an_index_that_is_no_view():
    with pytest.raises(RuntimeError, match="selected: expected 0 to 4, got 5"):
        objective(torch.randn(5, 3), 1, torch.tensor([5]))
