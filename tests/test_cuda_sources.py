"""The CUDA sources compile without warnings, within the recorded resources, and link to CUDA torch.

``TPT_FAST_ALL_ARCHITECTURES=1`` compiles for every architecture of the table (about 2.5 minutes of one core with nvcc
13.0) instead of for 9.0 alone (25 seconds).
"""

import os
import resource
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import cuda_sources
import pytest
import torch

from tpt_fast.extension import build, toolkit

CUDA = toolkit.cuda()
needs_nvcc = pytest.mark.skipif(CUDA is None, reason="no CUDA toolkit")
CHOSEN = list(cuda_sources.LIMITS) if os.environ.get("TPT_FAST_ALL_ARCHITECTURES") == "1" else [90]


@pytest.fixture(scope="module")
def compiled():
    known = cuda_sources.architectures(CUDA.nvcc)
    return cuda_sources.compile_all(CUDA.nvcc, [arch for arch in CHOSEN if arch in known])


@pytest.mark.slow
@needs_nvcc
@pytest.mark.parametrize("arch", CHOSEN)
def test_compiles_within_the_recorded_resources(compiled, arch):
    if arch not in compiled:
        pytest.skip(f"{CUDA.nvcc} does not know sm_{arch}")
    version, rows = cuda_sources.read_table()
    assert sorted(compiled[arch]) == sorted(rows), "kernels of the table: run tests/cuda_sources.py --write"
    spilled = {name for name, r in compiled[arch].items() if r.spills and is_hot(name)}
    assert not spilled, f"registers are spilled on sm_{arch}"
    if version == cuda_sources.version(CUDA.nvcc):  # another compiler takes other registers
        over = [name for name, found in compiled[arch].items() if exceeds(found, rows[name], arch)]
        assert not over, f"beyond csrc/resources.tsv on sm_{arch}; if there is a reason, tests/cuda_sources.py --write"


def exceeds(found, row, arch):
    """Whether a kernel takes more than its budget, or fewer of its blocks fit."""
    registers, stack, spills, occupancy = row[f"sm_{arch}"].split("/")
    budget = int(registers), int(stack), int(spills), int(row["shared"])
    taken = found.registers, found.stack, found.spills, found.shared
    return any(t > b for t, b in zip(taken, budget)) or round(100 * found.occupancy(arch)) < int(occupancy.rstrip("%"))


def test_the_budget():
    row = {"sm_90": "40/0/0/75%", "shared": "1024"}
    kernel = cuda_sources.Resources(threads=256, registers=40, stack=0, spills=0, shared=1024)
    assert kernel.occupancy(90) == 0.75
    assert not exceeds(kernel, row, 90)
    assert not exceeds(replace(kernel, registers=32), row, 90)
    for more in ({"registers": 41}, {"stack": 8}, {"spills": 4}, {"shared": 1025}):
        assert exceeds(replace(kernel, **more), row, 90)


@needs_nvcc
def test_bfloat16_compiles_where_there_is_none():
    """On 7.5 (T4, RTX 20), which has float16; the bindings refuse bfloat16 there."""
    if 75 not in cuda_sources.architectures(CUDA.nvcc):
        pytest.skip(f"{CUDA.nvcc} does not know sm_75")
    _, rows = cuda_sources.read_table()
    for name, found in cuda_sources.compile_one(
        CUDA.nvcc, cuda_sources.ROOT / "csrc" / "add_layer_norm.cu", 75
    ).items():
        assert name in rows
        assert not found.spills or not is_hot(name), name


def is_hot(name):
    """float64 is there to check gradients."""
    return "double" not in name


def test_no_hot_kernel_of_the_table_spills():
    _, rows = cuda_sources.read_table()
    assert len(rows) > 50
    for name, row in rows.items():
        for arch in cuda_sources.LIMITS:
            registers, _, spills, occupancy = row[f"sm_{arch}"].split("/")
            assert 8 <= int(registers) <= 255
            assert spills == "0" or not is_hot(name), f"{name} on sm_{arch}"
            assert occupancy != "0%"


@pytest.mark.parametrize(
    ("threads", "registers", "shared", "arch", "expected"),
    [
        (256, 32, 0, 80, 1.0),  # 8 blocks of 8 warps: all 64
        (256, 33, 0, 80, 0.75),  # 40 registers as they are given: 51 warps, so 48, 6 blocks
        (128, 16, 0, 86, 1.0),  # 12 blocks of 4 warps: all 48
        (32, 16, 0, 86, 16 / 48),  # no more than 16 blocks
        (1024, 64, 0, 90, 0.5),  # one block
        (256, 16, 48 << 10, 89, 16 / 48),  # two blocks of 49 KB in 100 KB
        (256, 255, 0, 120, 8 / 48),
        (256, 32, 0, 75, 1.0),  # 4 blocks of 8 warps: all 32
        (256, 16, 32 << 10, 75, 16 / 32),  # of 64 KB the system takes none
    ],
)
def test_occupancy(threads, registers, shared, arch, expected):
    found = cuda_sources.Resources(threads, registers, 0, 0, shared).occupancy(arch)
    assert found == pytest.approx(expected)


@needs_nvcc
def test_a_warning_and_a_spill_are_found(tmp_path):
    source = tmp_path / "warns.cu"
    source.write_text("__global__ void __launch_bounds__(32) k(int* p) { int unused; *p = 1; }")
    with pytest.raises(RuntimeError, match=r"(?s)warns\.cu for sm_90:.*unused"):
        cuda_sources.compile_one(CUDA.nvcc, source, 90)
    body = "".join(f"float v{i} = p[{i} * n];" for i in range(90)) + "__syncthreads();"
    body += "".join(f"p[{i} * n + 1] = v{i};" for i in range(90))
    source.write_text(f"__global__ void __launch_bounds__(1024) k(float* p, int n) {{ {body} }}")
    (found,) = cuda_sources.compile_one(CUDA.nvcc, source, 90).values()
    assert found.spills > 0
    assert found.threads == 1024


LOAD = """
import sys, torch, tpt_fast.ops.views, tpt_fast.ops.bias_act, tpt_fast.ops.add_layer_norm
import tpt_fast.ops.prefix_attention, tpt_fast.ops.adamw_step, tpt_fast.ops.objective
ops = [name.split("::")[1] for name in torch._C._dispatch_get_all_op_names() if name.startswith("tpt_fast::")]
torch.ops.load_library(sys.argv[1])
has = torch._C._dispatch_has_kernel_for_dispatch_key
without = [op for op in ops if op != "build_info" and not has(f"tpt_fast::{op}", "CUDA")]
print(len(ops), "ops; without CUDA:", without)
"""


@pytest.mark.slow
@needs_nvcc
def test_builds_links_and_loads_with_cuda_torch(tmp_path, monkeypatch):
    """One architecture has to take under a minute on two idle cores, so two minutes of the compilers' own time."""
    if torch.version.cuda is None:
        pytest.skip("this torch is a CPU build")
    if int(torch.version.cuda.partition(".")[0]) != CUDA.version[0]:
        pytest.skip(f"torch is built for CUDA {torch.version.cuda}, {CUDA.nvcc} is {CUDA.version}")
    monkeypatch.setattr(toolkit, "architectures", lambda: ["9.0"])
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    library = build.build(build.plan("cuda"), tmp_path)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    print(f"\nCUDA extension for one architecture: {seconds:.0f} s of compilers")
    assert seconds < 120
    root = Path(__file__).resolve().parent.parent
    result = subprocess.run(
        [sys.executable, "-c", LOAD, str(library)],
        env={**os.environ, "PYTHONPATH": str(root), "TPT_FAST_BACKEND": "reference"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.endswith("without CUDA: ['linear']\n"), result.stdout  # a GPU's libraries have it
    assert int(result.stdout.split()[0]) >= 10
