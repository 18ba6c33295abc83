"""The ops' own tests, which compare with the reference, on the CUDA kernels on the CPU: plainly and under sanitizers.

Each run is a process of its own, because the sanitizers have to be there before Python is.
"""

import os
import re
import subprocess
import sys

import pytest

pytest.importorskip("pybind11")
from cuda_on_cpu import build
from elsewhere import STEMS

if build.compiler() is None:
    pytest.skip("no host compiler", allow_module_level=True)

TESTS = build.HERE.parent


@pytest.mark.slow
@pytest.mark.parametrize("sanitize", [True, False], ids=["sanitized", "plain"])
def test_the_ops_own_tests_pass_on_their_kernels(sanitize):
    build.build(sanitize)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "cuda_on_cpu.plugin", "-p", "no:cacheprovider", "--tb=short"]
    # Without what takes long under a sanitizer; the one whose strips are one pixel wide takes long on any shim.
    command += ["--short"] if sanitize else ["-k", "not slivers"]
    environment = build.environment(sanitize) | {"CUDA_ON_CPU_SEED": str(1 + sanitize)}
    environment["PYTHONPATH"] = os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")])
    command += [f"tests/test_{stem}.py" for stem in STEMS]
    result = subprocess.run(command, env=environment, cwd=TESTS.parent, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-8000:] + result.stderr[-2000:]
    assert int(re.search(r"kernel launches: (\d+)", result.stdout)[1]) > 600
