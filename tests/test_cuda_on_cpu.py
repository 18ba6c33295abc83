"""The ops' own tests, which compare with the reference, on the CUDA kernels on the CPU: plainly and under sanitizers.

Each run is a process of its own, because the sanitizers have to be there before Python is; both work at the same time.
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


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The two processes, [plain, sanitized], each with the file of its output."""
    runs = []
    for sanitize in (False, True):
        build.build(sanitize)
        output = tmp_path_factory.mktemp("runs") / "output"
        command = [sys.executable, "-m", "pytest", "-q", "-s", "-p", "cuda_on_cpu.plugin", "-p", "no:cacheprovider"]
        command += [
            *(f"tests/test_{stem}.py" for stem in STEMS),
            "--tb=short",
            *(["--short"] if sanitize else ["-k", "not slivers"]),
        ]
        environment = build.environment(sanitize) | {"CUDA_ON_CPU_SEED": str(1 + sanitize), "OMP_NUM_THREADS": "1"}
        environment["PYTHONPATH"] = os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")])
        with output.open("w") as file:
            process = subprocess.Popen(
                command, env=environment, cwd=TESTS.parent, stdout=file, stderr=subprocess.STDOUT
            )
        runs.append((process, output))
    yield runs
    for process, _ in runs:
        process.kill()
        process.wait()


@pytest.mark.parametrize("sanitize", [True, False], ids=["sanitized", "plain"])
def test_the_ops_own_tests_pass_on_their_kernels(runs, sanitize):
    process, output = runs[sanitize]
    process.wait()
    text = output.read_text()
    assert process.returncode == 0, text[-8000:]
    assert int(re.search(r"kernel launches: (\d+)", text)[1]) > 600
