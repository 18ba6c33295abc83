"""Run the ops' own tests on their CUDA kernels: ``pytest -p cuda_on_cpu.plugin tests/test_views.py``.

``CUDA_ON_CPU_SEED`` shuffles blocks and threads; ``build.environment(sanitize=True)`` has what the sanitizers need.
"""

import os

import pytest

from . import build, ops

# Bounds that only the CPU's bindings check: a device cannot look at a tensor without waiting.
UNCHECKED = (
    "test_the_kernel_refuses_an_index_that_is_no_view",
    "test_specs",
)


def pytest_configure() -> None:
    os.environ["TPT_FAST_BACKEND"] = "reference"
    ops.install()
    build.load().set_seed(int(os.environ.get("CUDA_ON_CPU_SEED", "0")))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.name.startswith(UNCHECKED):
            item.add_marker(pytest.mark.skip("the device does not look at indices"))


def pytest_terminal_summary(terminalreporter) -> None:
    terminalreporter.write_line(f"kernel launches: {build.load().launches()}")
