"""Fixtures that several test files share."""

import ctypes
import os
import signal
import sys
from pathlib import Path

import pytest
import torch

from tpt_fast.bench.rates import full_float32

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT))  # recipes/ is no part of the package; the installed package, if there is one, goes first


def pytest_configure() -> None:
    full_float32()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # out of time: what has failed until then is told


@pytest.fixture(scope="session")
def golden_dir() -> Path:
    """The published code's answers on a small model; beside the project, or at TPT_FAST_GOLDEN."""
    folder = Path(os.environ.get("TPT_FAST_GOLDEN", ROOT.parent / "shared" / "golden"))
    if not folder.is_dir():
        pytest.skip(f"no golden answers at {folder}")
    return folder


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def ordinary_user():
    """File permissions hold for root too: this thread gives up the capabilities that override them."""
    if os.geteuid() != 0:
        yield
        return
    libc, header = ctypes.CDLL(None, use_errno=True), (ctypes.c_uint32 * 2)(0x20080522, 0)
    before, reduced = (ctypes.c_uint32 * 6)(), (ctypes.c_uint32 * 6)()  # (effective, permitted, inheritable) x 2
    for words in (before, reduced):
        if libc.capget(header, words):
            pytest.skip("capabilities cannot be read here")
    reduced[0] &= ~0b110  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
    assert libc.capset(header, reduced) == 0, os.strerror(ctypes.get_errno())
    yield
    assert libc.capset(header, before) == 0, os.strerror(ctypes.get_errno())
