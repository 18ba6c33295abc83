"""bias_act: kernel against the float64 reference, gradients, repeatability, messages."""

import bounds
import pytest
import torch

from tpt_fast.ops.bias_act import bias_act, bias_act_, bias_act_backward
from tpt_fast.reference import bias_act as reference

pytestmark = pytest.mark.numerics

ACTIVATIONS = ("gelu", "quick_gelu")
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


def inputs(shape, dtype, seed=0):
    noise = torch.Generator().manual_seed(seed)
    x = 3 * torch.randn(shape, generator=noise, dtype=torch.float64)
    bias = torch.randn(shape[-1], generator=noise, dtype=torch.float64)
    return x.to(dtype), bias.to(torch.float64 if dtype == torch.float64 else torch.float32)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(7, 33), (1, 1), (2, 3, 64), (5,), (0, 8), (300, 129)])
@pytest.mark.parametrize("with_bias", [True, False])
def test_equals_the_reference(shape, dtype, activation, with_bias):
    x, bias = inputs(shape, dtype)
    grad = inputs(shape, dtype, seed=1)[0]
    bias = bias if with_bias else None
    truth = x.double(), None if bias is None else bias.double(), activation == "quick_gelu"
    biased = truth[0] if bias is None else truth[0] + truth[1]
    y = bias_act(x, bias, activation)
    assert y.dtype == dtype
    assert y.shape == x.shape
    bounds.assert_rounded(y, reference.bias_act(*truth), bounds.activation(biased, dtype))
    filled = x.clone()
    assert bias_act_(filled, bias, activation) is filled
    assert torch.equal(filled, y)
    slope = reference.bias_act_backward(grad.double(), *truth)
    got = bias_act_backward(grad, x, bias, activation)
    bounds.assert_rounded(got, slope, bounds.activation_slope(biased, grad.double(), dtype))


@pytest.mark.long
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_absolute_error_in_float32(activation):
    """The approximation of erf is good to rounding, which grows only with the value itself."""
    x = torch.linspace(-12, 12, 200_001)
    truth = reference.bias_act(x.double(), None, activation == "quick_gelu")
    bounds.assert_within(bias_act(x, None, activation), truth, bounds.activation(x.double(), x.dtype))


@pytest.mark.long
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_extremes(activation):
    x = torch.tensor([0.0, 1e4, -1e4, torch.inf, torch.nan, 3e38, -3e38])
    y = bias_act(x, None, activation)
    assert torch.equal(y[:4], torch.tensor([0.0, 1e4, 0.0, torch.inf]))
    assert y[4].isnan()
    assert y[5] == x[5]
    assert y[6] == 0
    slope = bias_act_backward(torch.ones(3), x[:3], None, activation)
    assert torch.equal(slope, torch.tensor([0.5, 1.0, 0.0]))


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("width", [7, 512, 515, 1037])
def test_half_types_are_rounded_float32(width, dtype, activation):
    x, bias = inputs((5, width), dtype)
    grad = inputs((5, width), dtype, seed=1)[0]
    limits = torch.finfo(dtype)
    x[0, :6] = torch.tensor([limits.max, limits.min, limits.smallest_normal / 4, torch.inf, -torch.inf, torch.nan])
    grad[1, :4] = torch.tensor([limits.max, limits.smallest_normal / 4, torch.inf, torch.nan])
    x[1, :4], bias[0] = 1.5, limits.max / 4  # a sum beyond the largest number, a gradient of it, a tiny one
    for b in (bias, None):
        exact = {"rtol": 0, "atol": 0, "equal_nan": True}
        y = bias_act(x, b, activation)
        torch.testing.assert_close(y, bias_act(x.float(), b, activation).to(dtype), **exact)
        slope = bias_act_backward(grad, x, b, activation)
        torch.testing.assert_close(slope, bias_act_backward(grad.float(), x.float(), b, activation).to(dtype), **exact)
    assert bias_act(x, bias, activation)[0, 0] == torch.inf
    assert slope[1, 1] != 0


def test_non_contiguous_and_repeatable():
    x, bias = inputs((64, 40), torch.float32)
    sliced, b = x[::2, 3:20], bias[3:20]
    assert torch.equal(bias_act(sliced, b), bias_act(sliced.contiguous(), b))
    assert torch.equal(bias_act(x.t()), bias_act(x.t().contiguous()))
    assert torch.equal(bias_act(x, bias), bias_act(x, bias))


@pytest.mark.host
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradcheck(activation):
    x, bias = inputs((4, 6), torch.float64)
    x.requires_grad_(), bias.requires_grad_()
    assert torch.autograd.gradcheck(lambda x, bias: bias_act(x, bias, activation), (x, bias))
    assert torch.autograd.gradcheck(lambda x: bias_act(x, None, activation), (x,))


@pytest.mark.host
@pytest.mark.parametrize("quick", [True, False])
def test_opcheck(quick):
    x, bias = inputs((4, 6), torch.float32)
    torch.library.opcheck(torch.ops.tpt_fast.bias_act.default, (x.requires_grad_(), bias, quick))
    torch.library.opcheck(torch.ops.tpt_fast.bias_act_.default, (x.detach().clone(), bias, quick))
    torch.library.opcheck(torch.ops.tpt_fast.bias_act_backward.default, (torch.ones(4, 6), x.detach(), None, quick))


@pytest.mark.host
def test_messages():
    x = torch.zeros(2, 3)
    with pytest.raises(ValueError, match="activation: expected one of gelu, quick_gelu, got 'relu'"):
        bias_act(x, None, "relu")
    with pytest.raises(ValueError, match=r"bias: expected \[3\], got \[2\]"):
        bias_act(x, torch.zeros(2))
    with pytest.raises(TypeError, match=r"bias: expected torch.float32 .* got torch.float64"):
        bias_act(x, torch.zeros(3).double())
    with pytest.raises(ValueError, match=r"x: expected a contiguous tensor, got strides \(1, 3\)"):
        bias_act_(x.t())
    with pytest.raises(TypeError, match="x: expected torch"):
        bias_act(x.int())
