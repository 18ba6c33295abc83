"""The host's conversions of 16-bit types, held to NumPy's and PyTorch's over every half and around every rounding."""

import ctypes
import subprocess

import numpy as np
import pytest
import torch

from tpt_fast.extension import build, toolkit

pytestmark = pytest.mark.numerics

SOURCE = """
#include "half.h"
using namespace tpt_fast;
extern "C" void widen_halves(const Half* from, float* to, long n) {
  for (long i = 0; i < n; ++i) to[i] = widen(from[i]);
}
extern "C" void narrow_halves(const float* from, Half* to, long n) {
  for (long i = 0; i < n; ++i) to[i] = narrow<Half>(from[i]);
}
extern "C" void narrow_bfloats(const float* from, BFloat16* to, long n) {
  for (long i = 0; i < n; ++i) to[i] = narrow<BFloat16>(from[i]);
}
"""


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    try:
        compiler = toolkit.cxx().command
    except toolkit.BuildError as error:
        pytest.skip(str(error))
    folder = tmp_path_factory.mktemp("half")
    (folder / "half.cpp").write_text(SOURCE)
    command = [*compiler, "-std=c++20", "-O2", "-shared", "-fPIC", f"-I{build.source_root() / 'csrc'}"]
    subprocess.run([*command, str(folder / "half.cpp"), "-o", str(folder / "half.so")], check=True)
    return ctypes.CDLL(str(folder / "half.so"))


def convert(function, values, dtype):
    results = np.empty(len(values), dtype)
    function(
        values.ctypes.data_as(ctypes.c_void_p), results.ctypes.data_as(ctypes.c_void_p), ctypes.c_long(len(values))
    )
    return results


@pytest.fixture(scope="module")
def floats():
    """Every half, what lies half way to the next one and beside it, and floats of all sizes."""
    halves = np.arange(1 << 16, dtype=np.uint16).view(np.float16).astype(np.float32)
    with np.errstate(all="ignore"):
        middles = (halves[:-1].astype(np.float64) + halves[1:].astype(np.float64)).astype(np.float32) / 2
        beside = [np.nextafter(middles, side).astype(np.float32) for side in (np.float32(np.inf), np.float32(-np.inf))]
    any_bits = np.random.default_rng(0).integers(0, 1 << 32, 1 << 20, dtype=np.uint32).view(np.float32)
    edges = np.array([65504, 65519.996, 65520, 65535, 65536, 1e30, np.inf, 0.0, 2**-24, 2**-25, 2**-26], np.float32)
    return np.concatenate([halves, middles, *beside, any_bits, edges, -edges])


def same(got, want):
    nan = np.isnan(want)
    assert np.array_equal(np.isnan(got), nan)
    bits = np.uint32 if got.dtype == np.float32 else np.uint16
    assert np.array_equal(got[~nan].view(bits), want[~nan].view(bits))


def test_every_half_widens(library):
    halves = np.arange(1 << 16, dtype=np.uint16)
    same(convert(library.widen_halves, halves, np.float32), halves.view(np.float16).astype(np.float32))


def test_floats_round_to_half(library, floats):
    with np.errstate(all="ignore"):
        same(convert(library.narrow_halves, floats, np.uint16).view(np.float16), floats.astype(np.float16))


def test_floats_round_to_bfloat16(library, floats):
    got = torch.from_numpy(convert(library.narrow_bfloats, floats, np.int16)).view(torch.bfloat16).float().numpy()
    same(got, torch.from_numpy(floats).bfloat16().float().numpy())
