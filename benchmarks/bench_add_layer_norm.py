"""Residual add and LayerNorm, forward and input gradient: packed rows against PyTorch's own ops on padded ones."""

import packed
import pytest
import torch
from packed import ROWS, WIDTH
from timing import DEVICE, measure
from torch.nn.functional import layer_norm

from tpt_fast.ops.add_layer_norm import add_layer_norm, add_layer_norm_backward
from tpt_fast.reference import add_layer_norm as reference


def ours(x, delta, bias, weight, shift, grad_normed, grad_sum):
    total, normed, mean, rstd = add_layer_norm(x, delta, weight, shift, delta_bias=bias)
    return total, normed, add_layer_norm_backward(grad_normed, grad_sum, total, mean, rstd, weight)


def plain(x, delta, bias, weight, shift, grad_normed, grad_sum):
    total, normed, mean, rstd = reference.add_layer_norm(x, delta, bias, weight, shift, 1e-5)
    return total, normed, reference.add_layer_norm_backward(grad_normed, grad_sum, total, mean, rstd, weight)


def pytorch(x, delta, bias, weight, shift, grad_normed, grad_sum):
    total = (x + (delta + bias.to(x.dtype))).requires_grad_()
    normed = layer_norm(total, (WIDTH,), weight.to(x.dtype), shift.to(x.dtype))
    (grad,) = torch.autograd.grad(normed, total, grad_normed)
    return total.detach(), normed.detach(), grad + grad_sum


BACKENDS = {
    "tpt_fast": ours,
    "PyTorch, padded": pytorch,
    "PyTorch, packed": pytorch,
    "torch.compile, packed": torch.compile(plain, dynamic=False),
}


@pytest.mark.parametrize("dtype", packed.BOUNDS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_add_layer_norm(benchmark, backend, dtype):
    torch.manual_seed(0)
    x, delta, grad_normed, grad_sum = torch.randn(4, ROWS, WIDTH, device=DEVICE).to(dtype)
    given = x, delta, *torch.randn(3, WIDTH, device=DEVICE), grad_normed, grad_sum
    if "padded" in backend:
        given = tuple(packed.padded(t) if len(t) == ROWS else t for t in given)
    bound = packed.BOUNDS[dtype]
    for got, want in zip(BACKENDS[backend](*given), pytorch(*(t.double() for t in given)), strict=True):
        torch.testing.assert_close(got.double(), want, rtol=bound, atol=bound)
    benchmark.extra_info.update(op="add_layer_norm", case=packed.case(f"rows of {WIDTH}", dtype), backend=backend)
    # x, delta, sum, normed; two gradients, sum, one
    moved = dtype.itemsize * WIDTH * ROWS * (4 + 4) if backend == "tpt_fast" else 0
    measure(benchmark, BACKENDS[backend], given, rounds=100, warmup_rounds=10, moved=moved)
