"""Run the ops' own tests on their CUDA kernels: ``PYTHONPATH=tests pytest -p cuda_on_cpu.plugin tests/test_views.py``.

``CUDA_ON_CPU_SEED`` shuffles blocks and threads; ``build.environment(sanitize=True)`` has what the sanitizers need.
"""

import os

import elsewhere
import pytest

from . import build, ops


def pytest_addoption(parser: pytest.Parser) -> None:
    elsewhere.add_option(parser)


def pytest_configure() -> None:
    os.environ["TPT_FAST_BACKEND"] = "reference"
    elsewhere.install({op.__name__: op for op in ops.OPS})
    build.load().set_seed(int(os.environ.get("CUDA_ON_CPU_SEED", "0")))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    elsewhere.leave_out(config, items)


def pytest_terminal_summary(terminalreporter) -> None:
    terminalreporter.write_line(f"kernel launches: {build.load().launches()}")
