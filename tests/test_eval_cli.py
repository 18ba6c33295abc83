"""``tpt-fast eval`` and ``tpt-fast report`` over sets made for the test."""

import csv
import json
import math
import re
import sys
from types import SimpleNamespace

import numpy as np
import pyarrow.parquet as pq
import pytest
import typer
from command_line import FEW, one_demo_model, plain_terminal, rows, run, said  # noqa: F401
from eval_sets import Photos

from tpt_fast import TuneConfig, demo
from tpt_fast.cli import _shared
from tpt_fast.evaluation import metrics
from tpt_fast.evaluation import rows as of_run
from tpt_fast.evaluation.published import differences, published, published_config
from tpt_fast.evaluation.several import methods_of

HOSTILE = "</script><b>& photos"


@pytest.fixture
def sets(monkeypatch):
    """Image sets by their names, as the command opens them."""
    known = {"few": Photos(10, broken=(6,), name="few"), "other": Photos(4, name=HOSTILE)}

    def open_set(name, root=None, *, as_published=False, subset=False):
        if name not in known:
            raise ValueError(f"set: expected one of few, other, got {name!r}")
        return known[name]

    monkeypatch.setitem(sys.modules, "tpt_fast.evaluation.sets", SimpleNamespace(open_set=open_set))
    return known


def test_the_table_is_that_of_the_rows(sets, tmp_path):
    out = tmp_path / "out"
    args = ["eval", "few", "other", *FEW, "--method", "tpt,zero", "--seeds", "0,1", "--out", out]
    result = run(*args, code=1)  # an image is broken
    assert "few" in result.stdout
    assert "0006.jpg" in result.stdout
    assert re.search(r"few, seed 1: 100%.*tpt \d+\.\d%, zero \d+\.\d%, zero_shot \d+\.\d%, 1 failed", result.stderr)
    lines = rows(run("report", out, "--json"))
    assert [(line["set"], line["method"]) for line in lines if line["set"] == "few"] == [
        ("few", "zero_shot"),
        ("few", "tpt"),
        ("few", "zero"),
    ]
    assert {line["set"] for line in lines} == {"few", HOSTILE}
    merged = tmp_path / "rows.parquet"
    assert "give one of" in said(run("report", out, "--rows", merged, code=2))
    table = pq.read_table(next(out.glob("few*/rows/part-*")))
    assert table.schema.names == of_run.SCHEMA.names
    for line in lines:
        if line["set"] != "few":
            continue
        folder = out / "few" / "rows"
        tops = []
        for seed in (0, 1):
            found = of_run.read(folder, line["method"], seed)
            assert found.failed.sum() == line["failed"] == 1
            tops.append(100 * np.mean(found.rank[~found.failed] == 0))
        assert line["top1"] == pytest.approx(np.mean(tops))
        assert line["top1_sd"] == pytest.approx(np.std(tops, ddof=1))
        assert line["images"] == 9
        assert line["published_by"] == "no paper has this set"
    with open(out / "report.csv", newline="") as file:
        assert [row["method"] for row in csv.DictReader(file)] == [line["method"] for line in lines]
    whole = json.loads((out / "report.json").read_text())
    assert whole[0]["errors"] == {"0006.jpg": whole[0]["errors"]["0006.jpg"]}
    with open(out / "classes.csv", newline="") as file:
        classes = [row for row in csv.DictReader(file) if row["set"] == "few" and row["method"] == "tpt"]
    assert len(classes) == len(demo.CLASSNAMES)
    assert sum(int(row["images"]) for row in classes) == 9
    seen = [row for row in classes if row["images"] != "0"]
    weighted = sum(float(row["top1"]) * int(row["images"]) for row in seen) / 9
    tpt = next(line for line in lines if (line["set"], line["method"]) == ("few", "tpt"))
    assert weighted == pytest.approx(tpt["top1"])
    assert all(row["top1"] == "" for row in classes if row["images"] == "0")


def test_a_second_run_reads_no_image(sets, tmp_path, monkeypatch):
    args = ["eval", "few", *FEW, "--method", "tpt", "--out", tmp_path / "out", "--features", tmp_path / "features"]
    run(*args, code=1)
    monkeypatch.setattr("tpt_fast.evaluation.run.load_image", None)  # the report's gallery has its own
    run(*args, code=1)
    run(*args[:-3], tmp_path / "new", *args[-2:], "--lr", "0.01", code=1)


def test_latex_has_a_row_for_each_method_and_escapes_names(sets, tmp_path):
    run("eval", "other", *FEW, "--method", "tpt", "--out", tmp_path)
    text = (tmp_path / "report.tex").read_text()
    assert r"\& photos" in text
    assert text.count(r"\\") == 3
    assert "zero\\_shot & " in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "expected one of few, other, got 'nowhere'"),
        (["few", "--seeds", "a"], "expected numbers with commas, got 'a'"),
        (["few", "--seeds", "1,1"], "expected one or more different ones, got 1, 1"),
        (["few", "--pretrained", "openai"], "it goes with --model NAME"),
        (["few", "--method", "nothing"], "expected one of tpt"),
        (["few", "--option", "seed=3"], "seed is an option of the command itself"),
    ],
)
def test_bad_usage(sets, tmp_path, arguments, message):
    assert message in said(run("eval", *arguments, "--out", tmp_path / "out", code=2))


def test_other_options_are_refused_by_their_option(sets, tmp_path):
    run("eval", "other", *FEW, "--method", "tpt", "--out", tmp_path)
    found = said(run("eval", "other", "--views", "7", "--rho", "0.4", "--method", "tpt", "--out", tmp_path, code=2))
    assert "--views" in found
    assert "expected 6" in found
    assert "--lr" in said(run("eval", "other", *FEW, "--lr", "1", "--method", "tpt", "--out", tmp_path, code=2))


def test_a_reader_that_has_gone_costs_no_file(sets, tmp_path, monkeypatch):
    def gone(*_):
        raise typer.Exit(3)

    monkeypatch.setattr(_shared, "print_table", gone)
    monkeypatch.setattr(_shared, "json_line", gone)
    out = tmp_path / "out"
    run("eval", "other", "--views", "6", "--method", "zero_shot", "--out", out, code=3)
    assert (out / "report.html").is_file()
    for number, more in enumerate(([], ["--json"])):
        run("report", out, "--to", tmp_path / f"{number}", "--rows", tmp_path / f"{number}.parquet", *more, code=3)
        assert (tmp_path / f"{number}" / "report.html").is_file()
        assert (tmp_path / f"{number}.parquet").is_file()
    absent = run("report", out, "--rows", tmp_path / "absent" / "rows.parquet", code=2)
    assert "--rows:" in said(absent)
    assert "cannot be written: No such file" in said(absent)


def test_a_report_of_nothing(tmp_path):
    assert "expected the folder of an evaluation" in said(run("report", tmp_path, code=2))


def test_published_figures_stand_beside_ours_or_a_reason_does():
    found = published("imagenet-a", "tpt", "ViT-B-16-quickgelu", "openai")
    assert (found.top1, found.source) == (54.77, "TPT, table 1")
    assert published("Pets", "otpt", "ViT-B-16", "openai").ece == 1.9
    assert published("photos", "tpt", "ViT-B-16", "openai") == "no paper has this set"
    assert "OpenAI" in published("imagenet", "tpt", "ViT-B-16", "laion2b")
    assert "RN50" in published("imagenet", "tpt", "ViT-L-14", "openai")
    assert "could not be read" in published("imagenet", "mta", "RN50", "openai")
    assert differences("imagenet", {"method": "tpt"}, 64, "crops") == ""
    assert differences("pets", {"method": "tpt"}, 64, "crops") == "published with AugMix"
    assert differences("imagenet", {"method": "tpt"}, 32, "crops") == "32 views, not 64"
    strong = {"method": "ctpt", "lambda_term": 50.0}
    assert differences("imagenet_a", strong, 64, "augmix") == "lambda_term 50.0, not 20.0"
    assert differences("imagenet", strong, 64, "crops") == ""
    assert differences("photos", strong, 3, "augmix") == ""
    assert differences("pets", {"method": "own"}, 3, "augmix") == ""


def test_as_published_sets_what_the_authors_set():
    def chosen(method, name):
        config = published_config(TuneConfig(method=method), name)
        return config.views, methods_of(config)

    views, methods = chosen("tpt,ctpt", "pets")
    assert views == "augmix"
    assert methods["ctpt"].lambda_term == 50
    views, methods = chosen("ctpt,tda", "imagenet-a")
    assert (views, methods["ctpt"].lambda_term, methods["tda"].plain_view) == ("augmix", 20, False)
    views, methods = chosen("tpt,zero", "imagenet")
    assert views == "crops"
    assert chosen("tda", "cars")[1]["tda"].positive_beta == 7
    assert published_config(TuneConfig(method="official"), "dtd").views == "augmix"
    assert published_config(TuneConfig(lr=0.1), "pets").make_method().others.keys() == {"zero_shot"}
    assert published_config(TuneConfig(lr=0.1), "photos") == TuneConfig(lr=0.1)
    with pytest.raises(ValueError, match="tpt were published with AugMix and zero without"):
        chosen("tpt,zero", "pets")


def test_intervals_are_of_the_same_images(sets, tmp_path):
    run("eval", "few", *FEW, "--method", "tpt", "--out", tmp_path, code=1)
    line = rows(run("report", tmp_path, "--json"))[1]
    one, other = (of_run.read(tmp_path / "few" / "rows", method, 0) for method in ("tpt", "zero_shot"))
    good = ~one.failed
    expected = metrics.paired(one.right[good], other.right[good])
    assert line["difference_to_zero_shot"] == pytest.approx(100 * expected.difference)
    assert (line["gained"], line["lost"]) == (expected.gained, expected.lost)
    assert not math.isnan(line["low_to_zero_shot"])


def test_permuted_labels_end_it_before_the_first_row(sets, tmp_path):
    """Each photograph four times under the label of the next one's."""
    permuted = sets["few"] = Photos(32, name="few")
    right = permuted.label
    permuted.label = lambda i: right(i + 1)
    found = said(run("eval", "few", *FEW, "--method", "zero", "--rho", "0.1", "--out", tmp_path, code=2))
    assert "the labels are permuted" in found
    assert "looks like" in found
    assert not [*tmp_path.glob("*/rows/*")]
    run("eval", "few", "--views", "2", "--method", "zero", "--no-preflight", "--out", tmp_path)
    assert [*tmp_path.glob("*/rows/*")]
