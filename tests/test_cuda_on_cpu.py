"""Every op's CUDA kernels without a GPU: the ops' own tests, which compare with the reference, over tests/cuda_on_cpu."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("pybind11")
from cuda_on_cpu import build, ops

if build.compiler() is None:
    pytest.skip("no host compiler", allow_module_level=True)

HERE = Path(__file__).resolve().parent
FILES = [HERE / f"test_{name}.py" for name in ("objective", "views", "add_layer_norm", "bias_act")]
FILES += [HERE / f"test_{name}.py" for name in ("prefix_attention", "adamw_step")]
# Large sizes, and tests of the op's registration, say nothing more under the sanitizers, which are several times slower.
TOO_SLOW = "gradcheck or opcheck or megapixels or slivers or any_size or pass_orders or number_of_threads or 100.0"


@pytest.mark.parametrize(("sanitize", "seed"), [(False, 0), (True, 5)])
def test_the_ops_own_tests_pass_on_their_kernels(sanitize, seed):
    build.build(sanitize)
    environment = build.environment(sanitize)
    environment["CUDA_ON_CPU_SEED"] = str(seed)
    environment["PYTHONPATH"] = os.pathsep.join([str(HERE), str(HERE.parent), environment.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "cuda_on_cpu.plugin", "-p", "no:cacheprovider"]
    command += ["-k", f"not ({TOO_SLOW})"] if sanitize else []
    result = subprocess.run(
        [*command, *map(str, FILES)], env=environment, cwd=HERE.parent, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-4000:]
    launches = int(result.stdout.partition("kernel launches:")[2].split()[0])
    assert launches > (500 if sanitize else 3000)


def _objective():
    logits = torch.randn(2, 37, 1000)
    logits[:, 5], logits[:, 9, 3] = logits[:, 4], float("-inf")  # a tie, and a class that is impossible
    return ops.objective(logits, 4)


def _attention(dtype):
    offsets, heads = torch.tensor([0, 3, 4, 9] + list(range(10, 40))), 3
    rows, width = 5 + 39, heads * 64
    q, kv, grad = (torch.randn(2, rows, n * width, dtype=dtype) for n in (1, 2, 1))
    grad_q, grad_kv = torch.empty_like(q), torch.empty_like(kv)
    ops.prefix_attention_backward(grad, q, kv, offsets, 5, heads, grad_q, grad_kv)
    return ops.prefix_attention(q, kv, offsets, 5, heads), grad_q, grad_kv


def _layer_norm():
    x, delta, grad = torch.randn(3, 7, 515)
    bias, weight = torch.randn(2, 515)
    total, normed, mean, rstd = ops.add_layer_norm(x, delta, bias, weight, bias, 1e-5)
    return total, normed, ops.add_layer_norm_backward(grad, grad, total, mean, rstd, weight)


def _bias_act():
    x, grad = torch.randn(2, 7, 515)
    return ops.bias_act(x, x[0], True), ops.bias_act_backward(grad, x, x[0], False)


def _adamw():
    context, grad = torch.randn(2, 3, 4, 33)
    return ops.adamw_step(context, grad, None, None, None, 5e-3, 0.9, 0.999, 1e-8, 0.01, True)


CASES = {
    "objective": _objective,
    "prefix_attention": lambda: _attention(torch.float32),
    "prefix_attention_bfloat16": lambda: _attention(torch.bfloat16),
    "add_layer_norm": _layer_norm,
    "bias_act": _bias_act,
    "adamw_step": _adamw,
}


@pytest.mark.parametrize("case", CASES)
def test_any_order_of_blocks_and_threads_gives_the_same_bits(case):
    kernels = build.load()
    kernels.set_seed(0)
    torch.manual_seed(1)
    expected = CASES[case]()
    try:
        for seed in range(1, 6):
            kernels.set_seed(seed)
            torch.manual_seed(1)
            for got, want in zip(CASES[case](), expected, strict=True):
                assert torch.equal(got.contiguous().view(torch.uint8), want.contiguous().view(torch.uint8))
    finally:
        kernels.set_seed(0)
