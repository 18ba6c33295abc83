"""``tpt-fast methods``, and ``tune --method``."""

import json

from typer.testing import CliRunner

from tpt_fast.cli import app
from tpt_fast.demo import PHOTO_FOLDER
from tpt_fast.methods import METHODS, method_class, method_options


def run(*arguments):
    return CliRunner().invoke(app, [*map(str, arguments)], env={"COLUMNS": "300"})


def test_the_table_has_every_method_and_option():
    result = run("methods")
    assert result.exit_code == 0, result.output
    words = result.output.replace(",", " ").split()
    for name in METHODS:
        assert name in words
    assert "lambda_term" in words
    lines = [json.loads(line) for line in run("methods", "--json").output.splitlines()]
    assert [each["name"] for each in lines] == list(METHODS)
    for each in lines:
        assert set(each["options"]) == set(method_options(method_class(each["name"])))
    assert {each["name"] for each in lines if each["online"]} == {"tda"}
    assert {each["gradient"] for each in lines} == {"through the text tower", "of the class vectors", "none"}


def test_one_method():
    result = run("methods", "zero")
    assert "Part of the views that vote" in result.output
    wrong = run("methods", "zreo")
    assert wrong.exit_code == 2
    assert "did you mean 'zero'" in " ".join(wrong.output.replace("│", " ").split())


def test_tune_with_several():
    photo = PHOTO_FOLDER / "cat.jpg"
    result = run("tune", photo, "--method", "zero,mta", "--views", 8, "--json")
    assert result.exit_code == 0, result.output
    row = json.loads(result.stdout.splitlines()[-1])
    assert list(row["by_method"]) == ["zero", "mta"]
    assert row["by_method"]["zero"]["label"] == row["label"]
    assert row["entropy_before"] is None
    assert run("tune", photo, "--method", "mta", "--views", 8).exit_code == 0
    wrong = run("tune", photo, "--method", "zero", "--steps", 2)
    assert wrong.exit_code == 2
    assert "steps: expected 1, its default, with method 'zero'" in " ".join(wrong.output.replace("│", " ").split())
