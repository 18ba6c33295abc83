"""The products of ViT-B/16's towers on a CPU, with GELU behind the widest: ours on panels against torch's own."""

import pytest
import torch
from timing import DEVICE, measure
from torch.nn.functional import gelu

from tpt_fast.ops.bias_act import bias_act_
from tpt_fast.ops.linear import linear, panels

pytestmark = pytest.mark.skipif(DEVICE.type == "cuda", reason="on a GPU products are its libraries'")

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
    y = torch.nn.functional.linear(x, weight, bias)
    return gelu(y) if activation else y


BACKENDS = {"tpt_fast": ours, "PyTorch": pytorch, "PyTorch, bias_act_": with_bias_act}


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_linear(benchmark, backend, size):
    rows, depth, width, activation = SIZES[size]
    if backend == "PyTorch, bias_act_" and activation is None:
        pytest.skip("there is no activation")
    torch.manual_seed(0)
    x, weight, bias = torch.randn(rows, depth), torch.randn(width, depth) / depth**0.5, torch.randn(width)
    given = x, weight, panels(weight), bias, activation
    want = pytorch(*(t.double() if isinstance(t, torch.Tensor) else t for t in given))
    torch.testing.assert_close(BACKENDS[backend](*given).double(), want, rtol=1e-5, atol=1e-5)
    benchmark.extra_info.update(op="linear", case=size, backend=backend)
    measure(benchmark, BACKENDS[backend], given, rounds=60, warmup_rounds=5, flops=2 * rows * depth * width)
