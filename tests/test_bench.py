"""``tpt-fast bench --model``: what is measured, kept and shown, on a small model; and the parts that it is made of."""

import errno
import itertools
import json
import os
import subprocess
import sys
from types import SimpleNamespace

import models
import open_clip
import pytest
import torch
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode
from typer.testing import CliRunner

from tpt_fast import _machine
from tpt_fast.bench import agreement, case, measure, peak, picture, rates, rows, turns
from tpt_fast.cli import _shared, app

NAME, RATE = "tiny-to-measure", 5e10
CPU = torch.device("cpu")


@pytest.fixture(scope="module", autouse=True)
def _tiny(tmp_path_factory):
    """A small model that open_clip knows by name."""
    file = tmp_path_factory.mktemp("models") / f"{NAME}.json"
    file.write_text(json.dumps({"embed_dim": 32, "vision_cfg": models.VISION, "text_cfg": models.TEXT}))
    open_clip.add_model_config(file)


@pytest.fixture(autouse=True)
def _plain_terminal(monkeypatch):
    for name in ("FORCE_COLOR", "CLICOLOR_FORCE", "TPT_FAST_BACKEND"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("TERM", "dumb")


@pytest.fixture
def known_rate(monkeypatch):
    """The machine's matrix rate, which takes a second to measure."""
    monkeypatch.setattr(measure, "matrix_rate", lambda device, dtype: RATE)


@pytest.fixture(scope="module")
def small():
    return case.Case(case.RandomModel.of(NAME, CPU), 5)


def run(*arguments, code: int = 0):
    result = CliRunner().invoke(app, ["bench", *(str(a) for a in arguments)])
    assert result.exit_code == code, f"{result.exit_code}: {result.output}\n{result.exception!r}"
    return result


def tiny(*arguments, code: int = 0):
    """One number of classes, nothing but single images, each timed once."""
    few = ["--model", NAME, "--classes", 3, "--images", 0, "--repeats", 3, "--seconds", 0, "--device", "cpu"]
    return run(*few, *arguments, code=code)


def records(result) -> list[dict]:
    return [json.loads(line) for line in result.stdout.splitlines()]


def named(found: list[dict]) -> list[tuple[str, str]]:
    return [(row["case"].removeprefix(f"{NAME}, "), row["backend"]) for row in found]


# --- what is measured


@pytest.mark.slow
def test_every_row(tmp_path, known_rate):
    file, plot = tmp_path / "rows.jsonl", tmp_path / "picture.png"
    pytest.importorskip("matplotlib")
    options = ["--classes", 3, "--images", 2, "--repeats", 3, "--device", "cpu"]
    found = records(run("--model", NAME, *options, "--json", "--rows", file, "--plot", plot))
    starts = [(start, backend) for start in case.STARTS for backend in ("tpt_fast", "published")]
    parts = [*starts, ("batch of 2", "tpt_fast"), ("stream of 2", "tpt_fast")]
    assert named(found) == [(f"3 classes, {part}", backend) for part, backend in parts]
    assert found == rows.read(file)
    for row in found:
        assert row.items() >= rows.machine("cpu").items()
        assert row["min"] <= row["q20"] <= row["median"] <= row["q80"] <= row["max"]
        assert row["rounds"] == 3
        images = 2 if row["case"].endswith("of 2") else 1
        assert row["images_per_s"] == pytest.approx(images / row["median"], rel=1e-3)
        assert row["peak_mb"] is None or row["peak_mb"] >= 0
        if "shares" in row:
            assert sum(row["shares"].values()) == pytest.approx(1, abs=1e-3)
            assert row["matrix_gflops"] == RATE / 1e9
            assert row["over_floor"] == pytest.approx(row["median"] * RATE / (row["gflops"] * 1e9), rel=2e-3, abs=1e-3)
    for ours, theirs in zip(found[:4:2], found[1:4:2], strict=True):
        assert theirs["ratio"] == pytest.approx(theirs["median"] / ours["median"], rel=1e-3, abs=6e-3)
        assert theirs["differences"].keys() == {"zero_shot_logits", "entropies", "logits", "grad"}
    assert "load and views" in found[0]["shares"]
    assert "load and views" not in found[2]["shares"]
    with Image.open(plot) as opened:
        assert min(opened.size) > 100


def test_a_narrow_table_loses_nothing(monkeypatch, known_rate):
    monkeypatch.setenv("COLUMNS", "80")
    shown = tiny().stdout
    assert "…" not in shown
    for text in ("median", "20 %, 80 %", "images/s", "peak MB", "ratio", "floors", "published"):
        assert text in shown
    text = " ".join(shown.split())
    assert f"torch {torch.__version__}" in text


def test_the_floor_is_made_of_less_than_the_published_products(small):
    """Fewer products than the published way, more than the image tower's."""
    shares, flops = small.stages("given views")
    assert shares.keys() >= {"encode", "objective", "text backward", "text forward"}
    with FlopCounterMode(display=False) as published:
        small.published("given views")()
    with FlopCounterMode(display=False) as tower, torch.no_grad():
        small.tuner.clip.image.encode(small.views)
    assert tower.get_total_flops() < flops < published.get_total_flops()
    median = 2 * flops / RATE
    assert small.facts("given views", median, RATE)["over_floor"] == pytest.approx(2, abs=1e-3)


def test_less_than_everything(known_rate, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    found = records(tiny("--classes", 5, "--skip-published", "--json"))
    assert named(found) == [(f"{n} classes, {start}", "tpt_fast") for n in (3, 5) for start in case.STARTS]
    assert [row["rounds"] for row in found] == [1] * 4  # --seconds 0
    assert not torch.backends.cudnn.allow_tf32


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_half_precision(precision, known_rate):
    found = records(tiny("--precision", precision, "--json"))
    assert all(row["case"].endswith(f", {precision}") for row in found)
    assert [row["differences"].keys() for row in found if "differences" in row] == [{"zero_shot_logits"}] * 2


def test_no_memory_for_the_published_side(monkeypatch, known_rate):
    monkeypatch.setattr(case, "free_bytes", lambda _: 1e6)
    result = tiny("--json")
    assert {row["backend"] for row in records(result)} == {"tpt_fast"}
    needed = 4 * 16 * 3 * 77 * 2 * 64 / 1e9
    assert f"left out, it needs about {needed:.1f} GB, and 0.0 GB are free" in result.stderr


def test_answers_that_differ(monkeypatch, tmp_path, known_rate):
    published = case.tpt
    monkeypatch.setattr(case, "tpt", lambda *given: published(*given)._replace(logits=torch.ones(3)))
    result = tiny("--images", 1, "--json", "--rows", tmp_path / "rows", code=1)
    assert named(records(result)) == [("3 classes, batch of 1", "tpt_fast"), ("3 classes, stream of 1", "tpt_fast")]
    assert f"error: {NAME}, 3 classes, given views: logits: expected the published answer within" in result.stderr
    assert "answers differ in 2 of 4 measurements" in result.stderr
    assert len(rows.read(tmp_path / "rows")) == 2


# --- what is kept


def test_rows_replace_those_of_the_same_case_alone(tmp_path, known_rate):
    file = tmp_path / "new" / "rows.jsonl"
    tiny("--rows", file, "--skip-published")
    first, second = rows.read(file)
    others = [{**first, "cpu": "another"}, {**first, "backend": "published"}, {"case": "of another kind"}]
    rows.write(file, [{**first, "median": -1.0}, *others])
    assert len(rows.read(file)) == 5
    found = records(tiny("--rows", file, "--skip-published", "--json"))
    assert rows.read(file) == [*others, *found]
    assert named(found) == named([first, second])
    assert sorted(os.listdir(file.parent)) == [".rows.jsonl.lock", file.name]


def test_an_interrupted_run_loses_nothing(monkeypatch, tmp_path, known_rate):
    whole = measure.one_image

    def interrupted(case, start, **options):
        if start == "given views":
            raise KeyboardInterrupt
        return whole(case, start, **options)

    monkeypatch.setattr(measure, "one_image", interrupted)
    file = tmp_path / "rows.jsonl"
    result = CliRunner().invoke(
        app, ["bench", "--model", NAME, "--classes", "3", "--repeats", "3", "--rows", str(file)]
    )
    assert result.exit_code not in (0, 2, 3)
    assert named(rows.read(file)) == [("3 classes, a photograph", name) for name in ("tpt_fast", "published")]
    assert f"interrupted after 2 rows, which are in {file}" in result.stderr
    assert "a photograph" in result.stdout


def test_a_closed_pipe_is_no_full_disk(monkeypatch, known_rate):
    def closed(_record):
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    monkeypatch.setattr(_shared, "json_line", closed)
    assert "cannot be written" not in tiny("--json", "--skip-published", code=1).stderr


def test_the_commit_is_the_checkouts_or_none(monkeypatch, tmp_path):
    monkeypatch.setattr(rows, "__file__", str(tmp_path / "site-packages" / "tpt_fast" / "bench" / "rows.py"))
    assert rows._commit() is None


# --- bad usage and problems of the environment


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--classes", 10], "Missing option '--model'"),
        (["--model", "ViT-B-23"], "--model: open_clip has no model 'ViT-B-23'; did you mean"),
        (["--model", NAME, "--classes", 1], "Invalid value for '--classes'"),
        (["--model", NAME, "--classes", 1001], "Invalid value for '--classes'"),
        (["--model", NAME, "--precision", "fp8"], "--precision: precision: expected one of fp32, fp16, bf16"),
        (["--model", NAME, "--device", "abacus"], "--device: "),
        (["--model", NAME, "--repeats", 2], "Invalid value for '--repeats'"),
        (["--model", NAME, "--seconds", -1], "Invalid value for '--seconds'"),
        (["--model", NAME, "--images", -1], "Invalid value for '--images'"),
        (["--model", NAME, "--plot", "picture.txt"], "--plot: picture.txt ends in none of"),
        (["--model", NAME, "--plot", "nowhere/picture.png"], "--plot: nowhere/picture.png cannot be written"),
        (["--model", NAME, "--rows", "/proc/rows.jsonl"], "--rows: /proc/rows.jsonl cannot be written"),
    ],
)
def test_bad_usage(arguments, message, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    if "--plot" in arguments:
        pytest.importorskip("matplotlib")
    assert message in " ".join(run(*arguments, code=2).stderr.replace("│", " ").split())
    assert os.listdir(tmp_path) == []


def test_a_file_of_something_else_is_left_alone(tmp_path):
    file = tmp_path / "notes.txt"
    file.write_text('{"case": "one"}\nmilk, bread\n')
    message = " ".join(tiny("--rows", file, code=2).stderr.replace("│", " ").split())
    assert "expected a JSON object on line 2, got 'milk, bread'" in message
    assert file.read_text().endswith("milk, bread\n")


def test_a_model_that_cannot_be_made(monkeypatch):
    def create_model(*_, **__):
        raise OSError("no route to host")

    monkeypatch.setattr(open_clip, "create_model", create_model)
    assert f"{NAME} cannot be made: no route to host" in tiny(code=3).stderr


def test_a_model_that_cannot_be_tuned(monkeypatch):
    monkeypatch.setattr(open_clip, "create_model", lambda *_, **__: torch.nn.Module())
    assert "cannot be" in tiny(code=3).stderr


def test_a_plot_without_matplotlib(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.backend_bases", None)
    assert "matplotlib" in tiny("--plot", tmp_path / "a.png", code=3).stderr


def test_out_of_memory(monkeypatch):
    def one_image(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB\nmore")

    monkeypatch.setattr(measure, "one_image", one_image)
    assert f"{NAME}, 3 classes, a photograph: CUDA out of memory. Tried" in tiny(code=3).stderr


def test_help_does_without_it():
    code = (
        "import sys, tpt_fast.cli as c\nc.app(['bench', '--help'], standalone_mode=False)\n"
        "assert not {'torch', 'numpy', 'tpt_fast.bench'} & set(sys.modules)"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "--skip-published" in result.stdout


# --- the parts


def answers(**changed):
    """Two answers for four views and two classes, which are equal but for what is ``changed`` in ours."""
    same = {
        "zero_shot_logits": torch.tensor([1.0, -2.0]),
        "logits": torch.tensor([1.5, -2.0]),
        "grad": torch.tensor([[0.5, 0.25]]),
        "entropies": torch.tensor([0.4, 0.2, 0.3, 0.20001]),
        "selected": torch.tensor([1, 3]),
    }
    return SimpleNamespace(**{**same, **changed}), SimpleNamespace(**same)


def test_equal_answers():
    assert agreement.compare(*answers(), "fp32") == dict.fromkeys(agreement.BOUNDS["fp32"], 0.0)
    assert agreement.compare(*answers(), "bf16") == {"zero_shot_logits": 0.0}


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("zero_shot_logits", torch.tensor([1.0, -2.001]), "zero_shot_logits: .* difference of 0.0005"),
        ("logits", torch.tensor([1.5, torch.nan]), "logits: .* difference of nan"),
        ("grad", torch.tensor([[0.5, 0.251]]), "grad: .* difference of 0.002"),
        ("entropies", torch.tensor([0.5, 0.2, 0.3, 0.20001]), "entropies: .* difference of 0.25"),
        ("selected", torch.tensor([1, 2]), r"selected: expected the 2 views of lowest entropy, got \[1, 2\]"),
    ],
)
def test_each_difference_is_named(field, value, message):
    with pytest.raises(agreement.Disagreement, match=message):
        agreement.compare(*answers(**{field: value}), "fp32")


def test_views_that_only_rounding_tells_apart():
    """Which of the second and the fourth is kept says nothing; what follows from it is not compared."""
    entropies = torch.tensor([0.4, 0.20001, 0.3, 0.2])
    ours = {"selected": torch.tensor([3]), "entropies": entropies, "grad": torch.zeros(1, 2)}
    assert agreement.compare(*answers(**ours), "fp32").keys() == {"zero_shot_logits", "entropies"}


def test_turns(monkeypatch):
    """Calls of 1 and of 4 seconds, by a clock that only they move."""
    clock = [0.0]
    called = []

    def call(name, seconds):
        called.append(name)
        clock[0] += seconds

    monkeypatch.setattr(turns.time, "perf_counter", lambda: clock[0])
    runs = {"short": lambda: call("short", 1.0), "long": lambda: call("long", 4.0)}
    assert turns.take_turns(runs, 3) == {"short": [1.0] * 3, "long": [4.0] * 3}
    assert called == ["short", "long"] * 3
    assert turns.take_turns(runs, 3, 8.0) == {"short": [1.0] * 3, "long": [4.0] * 2}
    assert turns.take_turns(runs, 3, 0.0) == {"short": [1.0], "long": [4.0]}


def test_peak_sees_what_is_freed_again():
    found = peak.Peak(CPU)
    assert found.of(lambda: torch.ones(20_000_000).sum().item()) == 20_000_000
    if found.bytes is None:
        pytest.skip("the high-water mark of memory cannot be reset here")
    assert 76 <= found.mb < 150


def test_peak_where_the_system_forbids_it(monkeypatch):
    def forbidden(*_):
        raise PermissionError

    monkeypatch.setattr(_machine, "reset_peak", forbidden)
    found = peak.Peak(CPU)
    assert found.of(lambda: 3) == 3
    assert found.mb is None


def test_the_matrix_rate_is_that_of_the_fastest_round(monkeypatch):
    """By a clock that says how long each product took."""
    seconds = [0.5, 0.002] + [0.1] * 13
    clock = itertools.accumulate(moved for s in seconds for moved in (1.0, s))
    monkeypatch.setattr(rates.time, "perf_counter", lambda: next(clock))
    with FlopCounterMode(display=False) as counted:
        rate = rates.matrix_rate(CPU)
    assert rate == pytest.approx(counted.get_total_flops() / 15 / 0.002)


def test_a_picture_of_nothing(tmp_path):
    pytest.importorskip("matplotlib")
    with pytest.raises(ValueError, match="expected some of single images"):
        picture.draw([{"case": "a", "backend": "published", "median": 1.0}], tmp_path / "a.png")


def test_durations():
    assert [rows.duration(s) for s in (16.46, 0.00234, 58.2e-6, 3e-9)] == ["16.5 s", "2.34 ms", "58.2 µs", "3 ns"]
