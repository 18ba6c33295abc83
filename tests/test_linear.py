"""linear: kernel against the float64 reference, panels, repeatability, messages."""

import os
import subprocess
import sys

import bounds
import pytest
import torch
from torch.nn.functional import gelu
from torch.nn.functional import linear as plain

from tpt_fast.extension import load
from tpt_fast.ops.linear import linear, panels

pytestmark = pytest.mark.numerics

ACTIVATIONS = {None: lambda y: y, "gelu": gelu, "quick_gelu": lambda y: y * (1.702 * y).sigmoid()}

BOTH = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])


def inputs(rows, depth, width, seed=0, dtype=torch.float32):
    noise = torch.Generator().manual_seed(seed)
    x, weight, bias = (torch.randn(*shape, generator=noise) for shape in ((rows, depth), (width, depth), (width,)))
    return x.to(dtype), (weight / depth**0.5).to(dtype), bias


@BOTH
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize(
    ("rows", "depth", "width"),
    [
        (1, 1, 1), (6, 4, 16), (5, 3, 7), (7, 17, 33), (97, 513, 48), (200, 1100, 31), (13, 40, 160), (0, 5, 3),
        (4, 5, 0), (600, 64, 64), (11, 66, 128), (7, 65, 150),
    ],
)  # fmt: skip
def test_equals_the_reference(rows, depth, width, with_bias, activation, dtype):
    """Tiles at every edge, one part of the depth or several, one block of rows or several. Sums are of float32, and
    those of bfloat16 are rounded once."""
    x, weight, bias = inputs(rows, depth, width, dtype=dtype)
    bias = bias if with_bias else None
    y = linear(x, panels(weight), bias, width=width, activation=activation)
    assert y.dtype == dtype
    truth = plain(x.double(), weight.double(), None if bias is None else bias.double())
    bound = 1.2 * bounds.product(x, weight, bias)  # no activation is steeper
    bound += 0 if activation is None else bounds.activation(truth, torch.float32)
    bounds.assert_rounded(y, ACTIVATIONS[activation](truth), bound)


def test_bfloat16_without_the_processors_dot_products():
    """The same code's other half, which a CPU with avx512_bf16 runs only where torch is told to leave AVX-512 alone."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", __file__, "-k", "bfloat16 and not without"]
    run = subprocess.run(
        command, env=os.environ | {"ATEN_CPU_CAPABILITY": "avx2"}, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stdout


def test_bfloat16_is_no_further_off_than_torchs():
    """From float64, in all: torch's own product of bfloat16 is a sum in float32 at best."""
    x, weight, _ = inputs(128, 768, 512, dtype=torch.bfloat16)
    truth = plain(x.double(), weight.double())
    ours, theirs = ((y.double() - truth).norm() for y in (linear(x, panels(weight), width=512), plain(x, weight)))
    assert ours <= theirs * 1.001  # both are that of the last rounding


def test_leading_dimensions_and_strides():
    x, weight, bias = inputs(24, 20, 19)
    laid_out = panels(weight)
    flat = linear(x, laid_out, bias, width=19)
    assert torch.equal(linear(x.view(2, 3, 4, 20), laid_out, bias, width=19), flat.view(2, 3, 4, 19))
    wide = torch.randn(24, 40)
    wide[:, 7:27] = x
    assert torch.equal(linear(wide[:, 7:27], laid_out, bias, width=19), flat)
    assert torch.equal(linear(x.t().contiguous().t(), laid_out, bias, width=19), flat)
    assert torch.equal(linear(x, laid_out.transpose(1, 2).contiguous().transpose(1, 2), bias, width=19), flat)


def test_part_of_the_depth():
    """A slice of panels is read where it lies."""
    x, weight, _ = inputs(24, 20, 40)
    got, part = linear(x[:, 5:12], panels(weight)[:, 5:12], width=40), (x[:, 5:12], weight[:, 5:12])
    bounds.assert_within(got, plain(*(t.double() for t in part)), bounds.product(*part))


def test_panels_of_bfloat16():
    weight = torch.arange(70.0 * 3).view(70, 3).bfloat16()
    laid_out = panels(weight)
    assert laid_out.shape == (2, 2, 64, 2)
    assert torch.equal(laid_out[0, 0], weight[:64, :2])
    assert torch.equal(laid_out[1, 1, :6, 0], weight[64:, 2])
    assert (laid_out[1, :, 6:] == 0).all()
    assert (laid_out[:, 1, :, 1] == 0).all()


def test_panels():
    weight = torch.arange(18.0 * 2).view(18, 2)
    laid_out = panels(weight)
    assert laid_out.shape == (2, 2, 16)
    assert torch.equal(laid_out[0], weight[:16].t())
    assert torch.equal(laid_out[1, :, :2], weight[16:].t())
    assert (laid_out[1, :, 2:] == 0).all()


@BOTH
def test_threads_do_not_matter(threads, dtype):
    x, weight, bias = inputs(301, 200, 144, dtype=dtype)
    want = linear(x, panels(weight), bias, width=144, activation="gelu")
    for n in (2, 3):
        threads(n)
        assert torch.equal(linear(x, panels(weight), bias, width=144, activation="gelu"), want)


@BOTH
@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
def test_what_is_not_finite_stays_in_its_row_and_column(value, dtype):
    x, weight, bias = inputs(20, 30, 35, dtype=dtype)
    weight = weight.abs()
    bound = bounds.product(x, weight, bias)
    x[7, 3] = value
    y = linear(x, panels(weight), bias, width=35)
    bounds.assert_rounded(y, plain(*(t.double() for t in (x, weight, bias))), bound)
    x[7, 3], weight[5, 2] = 0.0, value
    y = linear(x, panels(weight), bias, width=35)
    bounds.assert_rounded(y, plain(*(t.double() for t in (x, weight, bias))), bound)


def test_opcheck():
    x, weight, bias = inputs(7, 20, 19)
    for b in (bias, None):
        torch.library.opcheck(torch.ops.tpt_fast.linear.default, (x, panels(weight), b, 19, 1))
        half = x.bfloat16(), panels(weight.bfloat16())
        torch.library.opcheck(torch.ops.tpt_fast.linear.default, (*half, b, 19, 2))


def test_messages():
    x, weight, bias = inputs(4, 20, 19)
    laid_out = panels(weight)
    with pytest.raises(ValueError, match="activation: expected one of gelu, quick_gelu or None, got 'relu'"):
        linear(x, laid_out, width=19, activation="relu")
    with pytest.raises(ValueError, match=r"panels: expected \[2, 20, 16\] with width=19 and x \[4, 20\], got \[3, 20"):
        linear(x, panels(torch.zeros(33, 20)), width=19)
    with pytest.raises(ValueError, match=r"bias: expected \[19\], got \[4\]"):
        linear(x, laid_out, bias[:4], width=19)
    with pytest.raises(TypeError, match=r"x: expected torch\.float32 or torch\.bfloat16, got torch\.float64"):
        linear(x.double(), laid_out, width=19)
    with pytest.raises(TypeError, match=r"panels: expected torch\.bfloat16 with x torch\.bfloat16, got torch\.float32"):
        linear(x.bfloat16(), laid_out, width=19)
    with pytest.raises(TypeError, match=r"weight: expected torch\.float32 or torch\.bfloat16, got torch\.float16"):
        panels(weight.half())
    with pytest.raises(ValueError, match=r"x: expected \[..., depth\], got \[\]"):
        linear(torch.tensor(1.0), laid_out, width=19)
    with pytest.raises(ValueError, match=r"weight: expected \[width, depth\], got \[3\]"):
        panels(torch.zeros(3))
    with pytest.raises(ValueError, match=r"weight: expected \[width, depth\], got \[3, 0\]"):
        panels(torch.zeros(3, 0))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.zeros(2, 3, 4), torch.zeros(1, 4, 16), None, 16, 0), r"x: expected \[rows, depth\], got \[2, 3, 4\]"),
        (
            (torch.zeros(2, 4), torch.zeros(1, 5, 16), None, 16, 0),
            r"panels: expected shape \[1, 4, 16\], got \[1, 5",
        ),
        ((torch.zeros(2, 4), torch.zeros(1, 4, 16), torch.zeros(4), 16, 0), r"bias: expected shape \[16\], got \[4\]"),
        ((torch.zeros(2, 0), torch.zeros(1, 0, 16), None, 16, 0), "depth: expected 1 to"),
        ((torch.zeros(2, 4), torch.zeros(1, 4, 16), None, 16, 3), "activation: expected 0 to 2, got 3"),
        ((torch.zeros(2, 4).double(), torch.zeros(1, 4, 16), None, 16, 0), "x: expected Float or BFloat16, got Double"),
        (
            (torch.zeros(2, 3).bfloat16(), torch.zeros(1, 2, 64, 2).bfloat16(), None, 16, 0),
            "depth: expected a multiple",
        ),
        (
            (torch.zeros(2, 4).bfloat16(), torch.zeros(1, 4, 64).bfloat16(), None, 16, 0),
            r"panels: expected shape \[1, 2, 64, 2\], got \[1, 4, 64\]",
        ),
    ],
)
def test_messages_of_the_kernel(arguments, message):
    if load.ensure().name != "native":
        pytest.skip("without the kernels")
    with pytest.raises(RuntimeError, match=message):
        torch.ops.tpt_fast.linear(*arguments)


def test_a_thread_with_a_small_stack():
    """Of 192 KB, as thread pools of servers have them; a block of rows lies elsewhere."""
    code = """
import threading, torch
from tpt_fast.ops import linear, panels
x, weight = torch.randn(300, 1536), torch.randn(64, 1536)
given, found = panels(weight), []
linear(x, given, width=64)
threading.stack_size(192 << 10)
thread = threading.Thread(target=lambda: found.append(linear(x, given, width=64)))
thread.start(), thread.join()
assert torch.equal(found[0], linear(x, given, width=64))
"""
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
