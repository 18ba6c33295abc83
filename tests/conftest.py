"""Fixtures that several test files share."""

import ctypes
import os
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

# Before torch and hypothesis are imported, and for all processes that tests start: one thread, for two that wait for
# one another on a busy machine take many times as long; and nothing is left in the checkout.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("HYPOTHESIS_STORAGE_DIRECTORY", str(Path(tempfile.gettempdir()) / f"hypothesis-{os.getuid()}"))

import hypothesis
import pytest
import torch
from builds import forget

from tpt_fast.bench.rates import full_float32
from tpt_fast.extension import build, toolkit

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT))  # recipes/ is no part of the package; the installed package, if there is one, goes first


def pytest_configure() -> None:
    full_float32()
    torch.set_num_threads(1)
    hypothesis.settings.register_profile("tests", deadline=None, derandomize=True, database=None)
    hypothesis.settings.load_profile("tests")
    # A shell that runs the tests in the background has SIGINT ignored, in them and all that they start.
    signal.signal(signal.SIGINT, signal.default_int_handler)
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
def threads() -> Iterator[Callable[[int], None]]:
    """Sets the number of threads that ops compute with, for this test."""
    yield torch.set_num_threads
    torch.set_num_threads(1)


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


# --- of the tests of the build


@pytest.fixture
def fresh(monkeypatch):
    """No choice made yet, nothing found yet, none of the user's settings."""
    settings = "BACKEND", "CUDA", "MARCH", "SHARED_CACHE"
    for name in (*(f"TPT_FAST_{setting}" for setting in settings), "CXX", "CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    forget(monkeypatch)
    found = toolkit.cxx, toolkit.cuda
    for search in found:
        search.cache_clear()
    yield
    for search in found:
        search.cache_clear()


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """Where builds go, not there yet."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("TPT_FAST_CACHE", str(folder))
    return folder


@pytest.fixture
def tree(tmp_path, monkeypatch):
    """A source tree of one file, in a folder whose name wants quoting."""
    root = tmp_path / "a tree: $5"
    for folder in ("csrc", "python"):
        (root / folder).mkdir(parents=True)
    (root / "csrc" / "tiny.cpp").write_text("int tpt_fast_tiny() { return 1; }\n")
    monkeypatch.setattr(build, "source_root", lambda: root)
    monkeypatch.setenv("TPT_FAST_CUDA", "0")
    return root
