"""Fixtures that several test files share."""

import os
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def golden_dir() -> Path:
    """The published code's answers on a small model; beside the project, or at TPT_FAST_GOLDEN."""
    folder = Path(os.environ.get("TPT_FAST_GOLDEN", ROOT.parent / "shared" / "golden"))
    if not folder.is_dir():
        pytest.skip(f"no golden answers at {folder}")
    return folder


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
