"""The command line, run in this process: what its test files share."""

import functools
import json

import pytest
from typer.testing import CliRunner

from tpt_fast import demo
from tpt_fast.cli import _models, app

CAT = demo.PHOTO_FOLDER / "cat.jpg"
FEW = ["--views", "6", "--rho", "0.4"]  # enough to see that everything is passed on


@pytest.fixture(autouse=True)
def plain_terminal(monkeypatch):
    for name in ("FORCE_COLOR", "CLICOLOR_FORCE", "TPT_FAST_BACKEND"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("TERM", "dumb")


_loaded_once = functools.lru_cache(_models.load_demo)


@pytest.fixture(autouse=True)
def one_demo_model(monkeypatch):
    """Most of a short command's time would be spent on loading it anew."""
    monkeypatch.setattr(_models, "load_demo", _loaded_once)


def run(*arguments, code: int = 0):
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    assert result.exit_code == code, f"{result.exit_code}: {result.output}\n{result.exception!r}"
    return result


def rows(result) -> list[dict]:
    return [json.loads(line) for line in result.stdout.splitlines()]


def said(result) -> str:
    """What stands on stderr, without its frames and line breaks."""
    return " ".join(result.stderr.replace("│", " ").split())
