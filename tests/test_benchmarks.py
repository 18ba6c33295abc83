"""The scripts in benchmarks/ that people run by hand."""

import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import typer
from typer.testing import CliRunner

ROOT = Path(__file__).resolve().parent.parent
BENCHMARKS = ROOT / "benchmarks"


def run(*command, **environment):
    return subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True)


@pytest.fixture
def tokens(monkeypatch):
    """The script, in a terminal so wide that no message is wrapped, wherever its file lies."""
    monkeypatch.setenv("COLUMNS", "300")
    app = typer.Typer()
    app.command()(runpy.run_path(str(BENCHMARKS / "bench_tokens.py"))["main"])
    return lambda *arguments: CliRunner().invoke(app, [str(a) for a in arguments])


def test_tokens_of_a_class_list(tmp_path, tokens):
    names = tmp_path / "names.txt"
    names.write_text("tench\n\n great white shark \ntench\n")
    result = tokens(names)
    assert result.exit_code == 0, result.stderr
    found = {line[:34].strip(): line[34:].strip() for line in result.stdout.splitlines()}
    text = " ".join(result.stdout.split())
    assert "tokens of all prompts, padded │ 231" in text, found
    # SOS and "a photo of a"; then each name (2, 3 and 2 tokens), the full stop and EOT.
    assert "shared prefix │ 5" in text
    assert "tokens, packed │ 18" in text
    assert "expected: a pass │ 12.8x" in text


def test_tokens_of_nothing(tmp_path, tokens):
    (tmp_path / "empty").write_text("\n")
    result = tokens(tmp_path / "empty")
    assert result.exit_code == 2
    assert "no class names" in result.stderr
    assert tokens(tmp_path / "absent").exit_code == 2


@pytest.mark.host
def test_the_tables_are_made_of_the_rows(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    made = runpy.run_path(str(BENCHMARKS / "table.py"))
    found = made["measured"]()
    assert made["ten_rows"](found) in (ROOT / "README.md").read_text()
    assert made["table"](found) in (ROOT / "docs" / "measured.md").read_text()


STUB = """#!/usr/bin/env bash
# Stands for a python on a machine with a GPU: says what it was asked for, and fails for whatever holds $FAILS.
[[ $1 == - ]] && exit 0
echo "ran: $*"
[[ -n ${FAILS:-} && "$*" == *"$FAILS"* ]] && exit 1
exit 0
"""


def gpu_script(tmp_path, *arguments, **environment):
    stub = tmp_path / "python"
    stub.write_text(STUB)
    stub.chmod(0o755)
    return run("bash", ROOT / ".ci" / "gpu", *arguments, PYTHON=str(stub), **environment)


def test_the_gpu_script_runs_every_stage(tmp_path):
    result = gpu_script(tmp_path, "--quick", CUDA_HOME=str(tmp_path))
    assert result.returncode == 0, result.stdout + result.stderr
    asked = [line for line in result.stdout.splitlines() if line.startswith("ran: ")]
    stems = sorted(path.stem for path in (ROOT / "csrc").glob("*.cu"))
    ops, devices, loop = (line for line in asked if " -m pytest " in line)
    assert f"-p on_cuda.plugin {' '.join(f'tests/test_{stem}.py' for stem in stems)}" in ops
    assert devices.endswith("tests/test_devices.py")
    assert loop.endswith("tests/test_tuner_on_cuda.py")
    summary = result.stdout.rpartition("===")[2].splitlines()[1:]
    assert [("passed" in line, "left out" in line) for line in summary] == [(True, False)] * 4 + [(False, True)]


def test_the_gpu_script_goes_on_after_a_failure_and_says_so(tmp_path):
    result = gpu_script(tmp_path, "--quick", FAILS="on_cuda.plugin", CUDA_HOME=str(tmp_path))
    assert result.returncode == 1
    summary = result.stdout.rpartition("===")[2]
    assert "the ops' tests on CUDA" in summary
    assert "FAILED (1)" in summary
    assert "repeats, graph replays, streams" in summary


def test_the_gpu_script_keeps_to_its_time(tmp_path):
    result = gpu_script(tmp_path, "--quick", SECONDS_IN_ALL="4", CUDA_HOME=str(tmp_path))
    assert result.returncode == 1
    assert "ran:" not in result.stdout.partition("===")[2]
    assert result.stdout.count("left out: no time left") >= 3


def test_the_gpu_script_names_what_is_missing():
    assert run("bash", ROOT / ".ci" / "gpu", "--fast").returncode == 2
    nothing = run("bash", ROOT / ".ci" / "gpu", PYTHON="/bin/false")
    assert nothing.returncode == 2
    assert "expected a python with torch, /bin/false has none" in nothing.stderr
    if not torch.cuda.is_available():
        none = run("bash", ROOT / ".ci" / "gpu", PYTHON=sys.executable)
        assert none.returncode == 2
        assert none.stderr == ".ci/gpu: expected a GPU, torch sees none\n"


@pytest.mark.parametrize("script", ["bench_text.py", "bench_tune.py"])
def test_pictures_want_a_path(script, monkeypatch):
    pytest.importorskip("pytest_benchmark")
    monkeypatch.setattr(sys, "argv", [script])
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    with pytest.raises(SystemExit, match="usage"):
        runpy.run_path(str(BENCHMARKS / script), run_name="__main__")
