"""Run the ops' own tests on the GPU: ``PYTHONPATH=tests pytest -p on_cuda.plugin tests/test_views.py``.

The tests stay as they are, on CPU tensors; each call of an op moves them to the GPU and the results back.
"""

import elsewhere
import pytest
import torch

from tpt_fast import ops  # noqa: F401 (which defines them)
from tpt_fast.extension import load

from .move import moved

OPS = (
    *elsewhere.STEMS, "add_layer_norm_backward", "bias_act_", "bias_act_backward", "prefix_attention_backward",
)  # fmt: skip
_calls = 0


def _on_cuda(name: str):
    op = getattr(torch.ops.tpt_fast, name).default

    def counted(*arguments):
        global _calls
        _calls += 1
        return op(*arguments)

    arguments = op._schema.arguments
    return moved(counted, tuple(i for i, a in enumerate(arguments) if a.alias_info and a.alias_info.is_write))


def pytest_addoption(parser: pytest.Parser) -> None:
    elsewhere.add_option(parser)


def pytest_configure() -> None:
    if not torch.cuda.is_available():
        raise pytest.UsageError("on_cuda.plugin: expected a GPU, torch sees none")
    backend = load.ensure("cuda")
    if backend.name != "native":
        raise pytest.UsageError(f"on_cuda.plugin: the kernels could not be built: {backend.why}")
    elsewhere.install({name: _on_cuda(name) for name in OPS})


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    elsewhere.leave_out(config, items)


def pytest_terminal_summary(terminalreporter) -> None:
    terminalreporter.write_line(f"calls on {torch.cuda.get_device_name()}: {_calls}")
