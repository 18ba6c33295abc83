"""``tpt-fast methods``, and ``tune --method``."""

import json

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import tpt_fast
from tpt_fast import demo
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


def test_options_of_a_method_and_augmix(tmp_path):
    photo, out = PHOTO_FOLDER / "cat.jpg", tmp_path / "rows.jsonl"
    command = ["tune", photo, "--method", "zero", "--views", 8, "--augment", "augmix", "--out", out]
    assert run(*command, "--option", "gamma=0.9").exit_code == 0
    (row,) = map(json.loads, out.read_text().splitlines()[-1:])
    loaded = demo.load()
    result = tpt_fast.tune(loaded.model, photo, loaded.classnames, method="zero", gamma=0.9, n_views=8, views="augmix")
    assert row["label"] == result.label
    assert row["prob"] == pytest.approx(result.probs.max().item(), abs=1e-5)
    assert run(*command, "--option", "gamma=0.9", "--resume").exit_code == 0
    assert run(*command, "--option", "gamma=0.8", "--resume").exit_code == 2
    for given, message in (
        ("gamma", "expected NAME=VALUE, got 'gamma'"),
        ("gamma=2", "gamma: expected a number in (0, 1], got 2"),
        ("lambda_y=2", "lambda_y: expected an option of TuneConfig or of method"),
        ("lr=2", "lr is an option of the command itself"),
    ):
        wrong = run("tune", photo, "--method", "zero", "--option", given)
        assert wrong.exit_code == 2
        assert message in " ".join(wrong.output.replace("│", " ").split())


def test_augmix_draws_from_the_global_generators_with_the_published_method():
    photo = PHOTO_FOLDER / "cat.jpg"
    command = ["tune", photo, "--method", "official", "--views", 10, "--augment", "augmix", "--json", "--seed", 3]
    first, again = (json.loads(run(*command).stdout.splitlines()[-1]) for _ in range(2))
    torch.manual_seed(3)
    np.random.seed(3)
    loaded = demo.load()
    result = tpt_fast.tune(loaded.model, photo, loaded.classnames, n_views=10, method="official", views="augmix")
    assert first["top"] == again["top"]
    assert first["prob"] == pytest.approx(result.probs.max().item(), abs=1e-5)
