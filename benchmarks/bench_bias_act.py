"""Bias and GELU, forward and input gradient: packed rows against PyTorch's own ops on padded ones."""

import packed
import pytest
import torch
from packed import ROWS, WIDTH
from timing import DEVICE, measure
from torch.nn.functional import gelu

from tpt_fast.ops.bias_act import bias_act, bias_act_backward
from tpt_fast.reference import bias_act as reference


def ours(x, bias, grad):
    return bias_act(x, bias), bias_act_backward(grad, x, bias)


def plain(x, bias, grad):
    return reference.bias_act(x, bias, False), reference.bias_act_backward(grad, x, bias, False)


def pytorch(x, bias, grad):
    leaf = x.detach().requires_grad_()
    out = gelu(leaf + bias.to(x.dtype))
    return out.detach(), torch.autograd.grad(out, leaf, grad)[0]


BACKENDS = {
    "tpt_fast": ours,
    "PyTorch, padded": pytorch,
    "PyTorch, packed": pytorch,
    "torch.compile, packed": torch.compile(plain, dynamic=False),
}


@pytest.mark.parametrize("dtype", packed.BOUNDS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_bias_act(benchmark, backend, dtype):
    torch.manual_seed(0)
    (x, grad), bias = torch.randn(2, ROWS, 4 * WIDTH, device=DEVICE).to(dtype), torch.randn(4 * WIDTH, device=DEVICE)
    if "padded" in backend:
        x, grad = packed.padded(x), packed.padded(grad)
    given, bound = (x, bias, grad), packed.BOUNDS[dtype]
    for got, want in zip(BACKENDS[backend](*given), pytorch(*(t.double() for t in given)), strict=True):
        torch.testing.assert_close(got.double(), want, rtol=bound, atol=bound)
    benchmark.extra_info.update(op="bias_act", case=packed.case(f"rows of {4 * WIDTH}, gelu", dtype), backend=backend)
    # x, out; gradient, x, gradient
    moved = dtype.itemsize * 4 * WIDTH * ROWS * (2 + 3) if backend == "tpt_fast" else 0
    measure(benchmark, BACKENDS[backend], given, rounds=60, warmup_rounds=5, moved=moved)
