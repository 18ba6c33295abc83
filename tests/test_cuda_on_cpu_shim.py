"""The stand-in for CUDA itself: it runs right kernels right, and finds what is wrong with wrong ones."""

import subprocess
import sys

import numpy as np
import pytest

pytest.importorskip("pybind11")
from cuda_on_cpu import build

if build.compiler() is None:
    pytest.skip("no host compiler", allow_module_level=True)

SEEDS = range(6)


@pytest.fixture(scope="module")
def shim():
    return build.load()


def launch(shim, name, values, out, *sizes):
    shim.shim_test(**{"name": name, "in": values, "out": out, "sizes": sizes})


def run(shim, name, values, out, blocks=1, threads=32, shared=0, seed=0):
    shim.set_seed(seed)
    out = np.full(out, -7, np.int32)
    launch(shim, name, np.asarray(values, np.int32), out, blocks, threads, shared)
    return out


@pytest.mark.parametrize("seed", SEEDS)
def test_barriers_and_shared_memory(shim, seed):
    values = np.arange(3 * 64)
    assert (run(shim, "reverse", values, 192, 3, 64, seed=seed) == values.reshape(3, 64)[:, ::-1].ravel()).all()
    assert (run(shim, "ring", values[:32], 32, shared=128, seed=seed) == np.roll(values[:32], -2)).all()


@pytest.mark.parametrize(("name", "shared"), [("reverse", 0), ("ring", 128)])
def test_a_shuffled_order_finds_a_missing_barrier(shim, name, shared):
    values = np.arange(64)
    right = run(shim, name, values, 64, 1, 32, shared)
    found = [(run(shim, f"{name}_race", values, 64, 1, 32, shared, seed) != right).any() for seed in SEEDS if seed]
    assert all(found)


def test_shared_memory_starts_poisoned(shim):
    out = run(shim, "poison", [], 128, threads=64, shared=256).reshape(64, 2)
    assert (out[0] == -1).all()
    assert (out[1:] == 7).all()
    # Also in the second block, although the first one wrote everything the second one reads.
    assert (run(shim, "poison", [], 128, 2, 64, 256)[:2] == -1).all()


@pytest.mark.parametrize("seed", SEEDS)
def test_the_last_block_sees_what_all_wrote(shim, seed):
    shim.set_seed(seed)
    out = np.zeros(3, np.int32)
    for _ in range(2):  # the counter has wrapped
        launch(shim, "arrive", np.arange(50, dtype=np.int32), out, 50, 1, 0)
    assert out.tolist() == [0, 2 * 1225, 2 * 1225]


@pytest.mark.parametrize("seed", SEEDS)
def test_warp_collectives(shim, seed):
    v, lane = np.random.default_rng(seed).integers(-1000, 1000, 32), np.arange(32)
    out = run(shim, "collectives", v, 14 * 32, seed=seed).reshape(14, 32)
    down = np.where(lane % 16 + 2 < 16, lane + 2, lane)
    odd, same = v & 1, v == v[3]
    votes = int((odd << lane.astype(np.int64)).sum())
    expected = [
        v[5],
        v[lane // 8 * 8 + (lane + 1) % 8],
        v[np.where(lane >= 3, lane - 3, lane)],
        v[down],
        v[lane ^ 9],
        np.uint32(votes).astype(np.int32),
        same.any(),
        same.all(),
        v.sum(),
        v.max(),
        np.where(lane < 16, v[:16].min(), np.bitwise_xor.reduce(v[16:])),
        odd.sum(),
        same.any(),
        same.all(),
    ]
    for row, want in zip(out, expected, strict=True):
        assert (row == want).all()


@pytest.mark.parametrize("seed", SEEDS)
def test_tensor_cores(shim, seed):
    values = np.random.default_rng(seed).integers(0, 100, (24, 16))
    a, b = values[:16], values[16:].reshape(16, 8)
    out = run(shim, "multiply", values, 128, seed=seed).reshape(16, 8)
    assert (out == a @ b + np.arange(128).reshape(16, 8)).all()
    assert (run(shim, "transpose", values[:4], 64, seed=seed).reshape(8, 8) == values[:4].reshape(8, 8).T).all()


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "returned_before_barrier",
            r"divergence: thread .* waits in __syncthreads at .*shim_test.cu:\d+ while .*returned",
        ),
        (
            "different_barriers",
            r"divergence: thread .* waits in __syncthreads .* while thread .* waits in __syncthreads",
        ),
        ("returned_before_shuffle", r"lane 30 reads lane 31, which is not in the mask or has returned"),
        ("returned_before_multiply", r"transpose_8x8: a lane has returned"),
        ("alone_in_a_vote", r"divergence: thread .* waits in __ballot_sync .* while thread .* waits in __syncthreads"),
    ],
)
def test_divergence_is_an_error(shim, name, message, seed):
    values = np.arange(64) % 2
    with pytest.raises(RuntimeError, match=message if seed == 0 else "divergence|returned"):
        run(shim, name, values, 64, seed=seed)
    assert (run(shim, "reverse", np.arange(64), 64, 1, 64) == np.arange(64)[::-1]).all()  # and the next launch works


@pytest.mark.parametrize(("blocks", "threads", "shared"), [(0, 32, 0), (1, 1025, 0), (1, 32, 49153)])
def test_launch_limits(shim, blocks, threads, shared):
    with pytest.raises(RuntimeError, match="invalid"):
        run(shim, "poison", [], 4096, blocks, threads, shared)


def test_arguments_are_never_copied_or_ignored(shim):
    out = np.zeros(64, np.int32)
    with pytest.raises(TypeError, match="in: item size"):
        launch(shim, "reverse", out.astype(np.int64), out, 1, 64, 0)
    with pytest.raises(TypeError, match=r"not an argument: .*colour"):
        shim.shim_test(**{"name": "reverse", "in": out, "out": out, "sizes": (1, 64, 0), "colour": 3})


def test_the_address_sanitizer_sees_the_end_of_shared_memory():
    code = (
        "import numpy as np; from test_cuda_on_cpu_shim import build, launch; shim = build.load()\n"
        "out = np.zeros(64, np.int32)\n"
        "launch(shim, 'reverse', out, out.copy(), 1, 64, 0); print('clean', flush=True)\n"
        "launch(shim, 'out_of_bounds', out, out, 1, 32, 128); print('missed')"
    )
    build.build(sanitize=True)
    result = subprocess.run(
        [sys.executable, "-c", code], env=build.environment(True), cwd=build.HERE.parent, capture_output=True, text=True
    )
    assert result.stdout == "clean\n"
    assert "heap-buffer-overflow" in result.stderr
