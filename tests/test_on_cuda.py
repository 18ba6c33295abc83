"""What the ops' own tests on the GPU rest on: that tensors get there and back as they were."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from elsewhere import STEMS
from on_cuda.move import moved, there

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize(
    "tensor",
    [
        torch.arange(24.0).view(2, 3, 4)[:, 1:, ::2],
        torch.arange(7).view(7, 1).expand(7, 3),
        torch.randn(5, 6).to(torch.bfloat16).t(),
        torch.arange(9, dtype=torch.uint8)[1:],
        torch.empty(0, 3),
    ],
)
def test_a_moved_tensor_has_the_same_bytes_and_strides(tensor):
    copy = there(tensor, "cpu")
    assert torch.equal(copy, tensor)
    assert (copy.dtype, copy.stride(), copy.storage_offset()) == (
        tensor.dtype,
        tensor.stride(),
        tensor.storage_offset(),
    )
    assert tensor.numel() == 0 or copy.data_ptr() != tensor.data_ptr()


def test_what_a_function_writes_comes_back():
    wide = torch.zeros(3, 8)
    left, right = wide[:, :4], wide[:, 4:]

    def function(scale, left, right, nothing):
        assert nothing is None
        left += 1
        right += 2
        return left * scale, (right, "kept")

    result, (other, kept) = moved(function, (1,), "cpu")(3.0, left, right, None)
    assert kept == "kept"
    assert (result == 3).all()
    assert (other == 2).all()
    assert (left == 1).all()
    assert (right == 0).all()  # not said to be written


def test_the_plugin_finds_every_op_by_itself():
    """It looks for them before any test has been imported."""
    code = "from on_cuda import plugin; print(*(name for name in plugin.OPS if plugin._on_cuda(name)))"
    path = os.pathsep.join([str(ROOT / "tests"), str(ROOT), os.environ.get("PYTHONPATH", "")])
    result = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    assert set(STEMS) <= set(result.stdout.split())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so():
    command = [sys.executable, "-m", "pytest", "-q", "-p", "on_cuda.plugin", "tests/test_bias_act.py"]
    path = os.pathsep.join([str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])
    result = subprocess.run(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True)
    assert result.returncode == pytest.ExitCode.USAGE_ERROR
    assert "expected a GPU, torch sees none" in result.stderr + result.stdout
