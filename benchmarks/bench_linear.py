"""The products of ViT-B/16's towers on a CPU, with GELU behind the widest: ours on panels against torch's own,
in float32 and in bfloat16, where torch's in float32 stands beside them."""

import pytest
import torch
from timing import DEVICE, measure
from torch.nn.functional import gelu

from tpt_fast.ops.bias_act import bias_act_
from tpt_fast.ops.linear import linear, panels

pytestmark = pytest.mark.skipif(DEVICE.type == "cuda", reason="on a GPU products are its libraries'")

DTYPES = {torch.float32: 1e-5, torch.bfloat16: 1e-2}  # and how far results may be off
SIZES = {  # of eight views and of 200 names: rows, depth, width, activation
    "1576x768 to 3072, gelu": (1576, 768, 3072, "gelu"),
    "1576x3072 to 768": (1576, 3072, 768, None),
    "1576x768 to 2304": (1576, 768, 2304, None),
    "829x512 to 2048": (829, 512, 2048, None),
    "829x2048 to 512": (829, 2048, 512, None),
}


def ours(x, weight, laid_out, bias, activation):
    return linear(x, laid_out, bias, width=len(weight), activation=activation)


def with_bias_act(x, weight, laid_out, bias, activation):
    """Torch's product, then our pass over it."""
    return bias_act_(torch.nn.functional.linear(x, weight), bias, activation)


def pytorch(x, weight, laid_out, bias, activation):
    y = torch.nn.functional.linear(x, weight, bias.to(x.dtype))
    return gelu(y) if activation else y


def in_float32(x, weight, laid_out, bias, activation):
    """Torch's, of what was bfloat16: what these products are held against."""
    return pytorch(x, weight, laid_out, bias, activation)


BACKENDS = {"tpt_fast": ours, "PyTorch": pytorch, "PyTorch, bias_act_": with_bias_act, "PyTorch, fp32": in_float32}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_linear(benchmark, backend, size, dtype):
    rows, depth, width, activation = SIZES[size]
    if backend == "PyTorch, bias_act_" and activation is None:
        pytest.skip("there is no activation")
    if backend == "PyTorch, fp32" and dtype == torch.float32:
        pytest.skip("that is PyTorch's")
    torch.manual_seed(0)
    x, weight, bias = torch.randn(rows, depth), torch.randn(width, depth) / depth**0.5, torch.randn(width)
    held = torch.float32 if backend == "PyTorch, fp32" else dtype
    x, weight = (t.to(dtype).to(held) for t in (x, weight))
    given = x, weight, panels(weight), bias, activation
    want = pytorch(*(t.double() if isinstance(t, torch.Tensor) else t for t in given))
    torch.testing.assert_close(BACKENDS[backend](*given).double(), want, rtol=DTYPES[dtype], atol=DTYPES[dtype])
    benchmark.extra_info.update(op="linear", case=size + ("" if dtype == torch.float32 else ", bf16"), backend=backend)
    measure(benchmark, BACKENDS[backend], given, rounds=60, warmup_rounds=5, flops=2 * rows * depth * width)
