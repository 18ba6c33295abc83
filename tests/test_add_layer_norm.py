"""add_layer_norm: kernel against the float64 reference and against LayerNorm itself."""

import bounds
import pytest
import torch

from tpt_fast.ops.add_layer_norm import add_layer_norm, add_layer_norm_backward
from tpt_fast.reference import add_layer_norm as reference

pytestmark = pytest.mark.numerics

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


def inputs(shape, dtype, seed=0):
    noise = torch.Generator().manual_seed(seed)

    def draw(*size):
        return torch.randn(*size, generator=noise, dtype=torch.float64)

    width, wide = shape[-1], torch.float64 if dtype == torch.float64 else torch.float32
    x, delta = draw(*shape) + 2, draw(*shape)
    return x.to(dtype), delta.to(dtype), *(draw(width).to(wide) for _ in range(3))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(7, 33), (1, 8), (2, 3, 64), (16,), (0, 8), (90, 131), (3, 515), (2, 1100)])
@pytest.mark.parametrize("branch", ["none", "delta", "delta and bias"])
def test_equals_the_reference(shape, dtype, branch):
    x, delta, delta_bias, weight, bias = inputs(shape, dtype)
    delta = None if branch == "none" else delta
    delta_bias = delta_bias if branch == "delta and bias" else None
    total, normed, mean, rstd = add_layer_norm(x, delta, weight, bias, 1e-5, delta_bias=delta_bias)
    parts = [t.double() for t in (x, delta, delta_bias) if t is not None]
    added = sum(parts)
    bounds.assert_rounded(total, added, bounds.rounding(2, dtype) * sum(t.abs() for t in parts), "sum")
    # Statistics are those of the stored sum, whatever its type.
    stored = total.double(), weight.double(), bias.double()
    truth = torch.nn.functional.layer_norm(stored[0], shape[-1:], *stored[1:], 1e-5)
    bounds.assert_rounded(normed, truth, bounds.layer_norm(*stored, 1e-5, dtype), "normed")
    assert normed.dtype == dtype
    assert mean.shape == x.shape[:-1]
    assert mean.dtype == weight.dtype
    if delta is None:
        assert total is x

    grad_normed, grad_sum = inputs(shape, dtype, seed=1)[:2]
    for through in (grad_sum, None):
        grad = add_layer_norm_backward(grad_normed, through, total, mean, rstd, weight)
        wide = [None if t is None else t.double() for t in (grad_normed, through, total, mean, rstd, weight)]
        truth = reference.add_layer_norm_backward(*wide)
        bounds.assert_rounded(grad, truth, bounds.layer_norm_backward(*wide, dtype), "grad")


def test_large_offset_keeps_its_variance():
    x = torch.randn(3, 512, generator=torch.Generator().manual_seed(0)) + 1000
    weight, bias = torch.ones(512), torch.zeros(512)
    normed = add_layer_norm(x, None, weight, bias).normed
    truth = torch.nn.functional.layer_norm(x.double(), (512,))
    bound = bounds.layer_norm(x.double(), weight.double(), bias.double(), 1e-5, torch.float32)
    bounds.assert_within(normed, truth, bound)
    assert bound.max() < 0.05  # a variance from squares of a thousand would be all rounding


def test_bad_rows_stay_alone_and_constant_rows_are_finite():
    x, _, _, weight, bias = inputs((4, 16), torch.float32)
    x[1, 3], x[2] = torch.nan, 5.0
    normed = add_layer_norm(x, None, weight, bias).normed
    assert normed[1].isnan().all()
    assert normed[[0, 2, 3]].isfinite().all()
    # Of a constant, the mean is off by roundings, which eps keeps small.
    bounds.assert_within(normed[2], bias, bounds.rounding(16) * (5.0 / 1e-5**0.5 * weight.abs() + bias.abs()))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("width", [9, 515])
def test_half_types_are_rounded_where_they_are_stored(width, dtype):
    x, delta, delta_bias, weight, bias = inputs((4, width), dtype)
    limits = torch.finfo(dtype)
    x[1, 2] = delta[1, 2] = limits.max  # their sum is beyond it
    x[2], delta[2], delta_bias[:] = limits.smallest_normal / 4, limits.smallest_normal / 8, 0
    total, normed, mean, rstd = add_layer_norm(x, delta, weight, bias, 1e-5, delta_bias=delta_bias)
    assert torch.equal(total, (x.float() + (delta.float() + delta_bias)).to(dtype))
    assert total[1, 2] == torch.inf
    assert normed[1].isnan().all()
    bounds.assert_within(mean[2], total[2, 0], bounds.rounding(width) * total[2, 0].double())

    grad = add_layer_norm_backward(total, x, total, mean, rstd, weight)
    assert grad[1].isnan().all()
    rows = [0, 2, 3]
    wide = [t[rows].float() for t in (total, x, total, mean, rstd)]
    bound = bounds.layer_norm_backward(*(t.double() for t in (*wide, weight)), dtype)
    bounds.assert_rounded(grad[rows], add_layer_norm_backward(*wide, weight), 2 * bound)


def test_non_contiguous_and_repeatable():
    x, delta, delta_bias, weight, bias = inputs((40, 48), torch.float32)
    cut = slice(None, None, 3), slice(5, 30)
    params = weight[5:30], bias[5:30]
    for one, two in zip(
        add_layer_norm(x[cut], delta[cut], *params, delta_bias=delta_bias[5:30]),
        add_layer_norm(x[cut].contiguous(), delta[cut].contiguous(), *params, delta_bias=delta_bias[5:30]),
        strict=True,
    ):
        assert torch.equal(one, two)


@pytest.mark.host
def test_gradcheck():
    x, delta, delta_bias, weight, bias = (t.requires_grad_() for t in inputs((3, 7), torch.float64))

    def both(x, delta, delta_bias, weight, bias):
        return add_layer_norm(x, delta, weight, bias, 1e-5, delta_bias=delta_bias)[:2]

    assert torch.autograd.gradcheck(both, (x, delta, delta_bias, weight, bias))
    assert torch.autograd.gradcheck(lambda x: add_layer_norm(x, None, weight, bias).normed, (x,))


@pytest.mark.host
@pytest.mark.parametrize("with_delta", [True, False])
def test_opcheck(with_delta):
    x, delta, delta_bias, weight, bias = inputs((3, 8), torch.float32)
    delta, delta_bias = (delta, delta_bias) if with_delta else (None, None)
    args = x.requires_grad_(), delta, delta_bias, weight, bias, 1e-5
    torch.library.opcheck(torch.ops.tpt_fast.add_layer_norm.default, args)
    args = x.detach(), None, x.detach(), x.detach()[:, 0], x.detach()[:, 1], weight
    torch.library.opcheck(torch.ops.tpt_fast.add_layer_norm_backward.default, args)


@pytest.mark.host
def test_messages():
    x, delta, delta_bias, weight, bias = inputs((3, 8), torch.float32)
    with pytest.raises(ValueError, match=r"delta: expected \[3, 8\], got \[2, 8\]"):
        add_layer_norm(x, delta[:2], weight, bias)
    with pytest.raises(ValueError, match=r"weight: expected \[8\], got \[3\]"):
        add_layer_norm(x, delta, weight[:3], bias)
    with pytest.raises(ValueError, match="delta_bias: expected None without delta"):
        add_layer_norm(x, None, weight, bias, delta_bias=delta_bias)
    with pytest.raises(TypeError, match=r"weight: expected torch.float32, got torch.float64"):
        add_layer_norm(x, delta, weight.double(), bias)
    with pytest.raises(TypeError, match=r"delta: expected torch.float32, got torch.float16"):
        add_layer_norm(x, delta.half(), weight, bias)
