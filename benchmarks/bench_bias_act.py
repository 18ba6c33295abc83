"""Bias and GELU, forward and input gradient: packed rows against PyTorch's own ops on padded ones."""

import packed
import pytest
import torch
from packed import CLASSES, LONGEST, ROWS, WIDTH
from timing import DEVICE, measure
from torch.nn.functional import gelu

from tpt_fast.ops.bias_act import bias_act, bias_act_backward


def ours(x, bias, grad):
    return bias_act(x, bias), bias_act_backward(grad, x, bias)


def pytorch(x, bias, grad):
    leaf = x.detach().requires_grad_()
    out = gelu(leaf + bias)
    return out.detach(), torch.autograd.grad(out, leaf, grad)[0]


BACKENDS = {"tpt_fast": ours, "PyTorch, padded": pytorch, "PyTorch, packed": pytorch}


@pytest.mark.parametrize("backend", BACKENDS)
def test_bias_act(benchmark, backend):
    torch.manual_seed(0)
    (x, grad), bias = torch.randn(2, ROWS, 4 * WIDTH, device=DEVICE), torch.randn(4 * WIDTH, device=DEVICE)
    if "padded" in backend:
        x, grad = packed.padded(x), packed.padded(grad)
    given = x, bias, grad
    for got, want in zip(BACKENDS[backend](*given), pytorch(*(t.double() for t in given)), strict=True):
        torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-5)
    case = f"{ROWS} packed or {CLASSES}x{LONGEST} padded rows of {4 * WIDTH}, gelu"
    benchmark.extra_info.update(op="bias_act", case=case, backend=backend)
    moved = 4 * 4 * WIDTH * ROWS * (2 + 3) if backend == "tpt_fast" else 0  # x, out; gradient, x, gradient
    measure(benchmark, BACKENDS[backend], given, rounds=60, warmup_rounds=5, moved=moved)
