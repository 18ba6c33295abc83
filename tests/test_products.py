"""Which product runs a tower's layers: measured once a machine, kept, and read again."""

import json
import os
import stat
import subprocess
import sys

import models
import pytest
import torch

from tpt_fast import TuneConfig, Tuner
from tpt_fast.clip import Clip
from tpt_fast.extension import load
from tpt_fast.models import products
from tpt_fast.models.products import Measured

FLOAT = torch.float32


@pytest.fixture
def kept(tmp_path, monkeypatch):
    """A folder in which nothing is kept yet, with kernels whose times are given."""
    load.ensure()  # out of the cache that holds it
    monkeypatch.setenv("TPT_FAST_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("TPT_FAST_PRODUCT", raising=False)
    monkeypatch.setattr(products.load, "ensure", lambda *device: load.Backend("native"))
    products._measured.cache_clear()
    yield tmp_path / "cache"
    products._measured.cache_clear()


@pytest.fixture
def times(monkeypatch):
    """What the next measurements find; those that were asked for."""
    found, asked = [], []
    monkeypatch.setattr(products, "measure", lambda dtype: (asked.append(dtype), found.pop(0))[1])
    return found, asked


@pytest.fixture
def lax_umask():
    before = os.umask(0o002)
    yield
    os.umask(before)


def test_measured_once_and_kept(kept, times, lax_umask):
    found, asked = times
    found += [Measured(1.0, 2.0), Measured(2.0, 1.0)]
    assert products.own_is_faster(FLOAT)
    products._measured.cache_clear()  # another process
    assert products.own_is_faster(FLOAT)
    assert asked == [FLOAT]
    (file,) = kept.glob("product-*.json")
    assert stat.S_IMODE(kept.stat().st_mode) == 0o755  # or builds in it would be refused
    assert json.loads(file.read_text())["about"]["torch"] == torch.__version__
    file.write_text('{"own": 0}')  # is not believed
    products._measured.cache_clear()
    assert not products.own_is_faster(FLOAT)
    assert asked == [FLOAT] * 2


@pytest.mark.parametrize("what", ["threads", "torch", "cpu", "kernels"])
def test_whatever_it_depends_on_is_measured_anew(kept, times, monkeypatch, threads, what):
    found, asked = times
    found += [Measured(1.0, 2.0), Measured(2.0, 1.0)]
    assert products.own_is_faster(FLOAT)
    products._measured.cache_clear()
    if what == "threads":
        threads(2)
    elif what == "torch":
        monkeypatch.setattr(torch, "__version__", "3.0")
    elif what == "cpu":
        monkeypatch.setattr(products, "cpu_name", lambda: "another")
    else:
        monkeypatch.setattr(products.load, "ensure", lambda *device: load.Backend("native", kept / "another.so"))
    assert not products.own_is_faster(FLOAT)
    assert len(asked) == len(list(kept.glob("product-*.json"))) == 2


def test_ours_has_to_win_by_more_than_noise(kept, times):
    found, _ = times
    found.append(Measured(0.97, 1.0))
    assert not products.own_is_faster(FLOAT)


def test_where_nothing_can_be_kept_it_is_measured_all_the_same(kept, times):
    kept.write_text("in the way")
    times[0].append(Measured(1.0, 2.0))
    assert products.own_is_faster(FLOAT)
    assert products.own_is_faster(FLOAT)


def test_the_variable_decides_without_measuring(kept, times, monkeypatch):
    for choice, own in (("own", True), ("torch", False)):
        monkeypatch.setenv("TPT_FAST_PRODUCT", choice)
        assert products.own_is_faster(FLOAT) is own
        assert products.described(FLOAT).endswith(f"(TPT_FAST_PRODUCT={choice})")
    monkeypatch.setenv("TPT_FAST_PRODUCT", "mkl")
    with pytest.raises(ValueError, match="TPT_FAST_PRODUCT: expected auto, own or torch, got 'mkl'"):
        products.own_is_faster(FLOAT)
    assert times[1] == []


def test_without_kernels_it_is_torchs(kept, times, monkeypatch):
    monkeypatch.setattr(products.load, "ensure", lambda *device: load.Backend("reference"))
    monkeypatch.setenv("TPT_FAST_PRODUCT", "own")
    assert not products.own_is_faster(FLOAT)
    monkeypatch.undo()
    assert not products.own_is_faster(torch.float64)


@pytest.mark.parametrize(("half", "precision"), [(0.5, "bf16"), (0.9, "fp32")])
def test_auto_is_the_precision_that_is_faster_by_far(kept, monkeypatch, half, precision):
    seconds = {FLOAT: Measured(2.0, 1.0), torch.bfloat16: Measured(half, 3.0)}
    monkeypatch.setattr(products, "measure", seconds.get)
    clip = Clip(models.clip(), "auto")
    assert clip.precision == precision
    assert Tuner(clip, ["cat", "dog"], TuneConfig(precision="auto")).clip is clip
    assert products.fastest_precision(torch.device("cuda")) == "fp32"
    monkeypatch.setenv("TPT_FAST_PRODUCT", "torch")
    assert products.fastest_precision(torch.device("cpu")) == "fp32"


def test_processes_that_begin_together_have_one_answer(tmp_path):
    if load.ensure().name != "native":
        pytest.skip("without the kernels")
    code = """
import sys, torch
from pathlib import Path
from tpt_fast.extension import load
load.ensure()
from tpt_fast.models import products
products.builds.folder = lambda: Path(sys.argv[1])
print(products.measured(torch.float32))
"""
    command = [sys.executable, "-c", code, str(tmp_path)]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    one, other = (each.communicate()[0] for each in running)
    assert one == other
    assert one.startswith("Measured(own=0.0")


def test_measuring_takes_a_fraction_of_a_second():
    before = torch.get_rng_state()
    found = products.measure(FLOAT)
    assert 0 < found.own < 1
    assert 0 < found.torch < 1
    assert torch.equal(torch.get_rng_state(), before)
