"""``tpt-fast map``, and the picture of a map."""

import models
import numpy as np
import open_clip
import pytest
import torch
from command_line import CAT, plain_terminal, rows, run, said  # noqa: F401 (a fixture)
from PIL import Image

import tpt_fast
from tpt_fast import demo
from tpt_fast.cli import _models

NAMES = ["cat", "a meadow", "tower"]
GIVEN = ["--classes", ",".join(NAMES), "--model", "ViT-B-32", "--pretrained", "none"]


@pytest.fixture(scope="module")
def small():
    return models.clip(std=0.2)


@pytest.fixture(autouse=True)
def small_models(small, monkeypatch):
    """In place of what is asked for, which takes seconds to make."""
    loaded = _models.Loaded(small, open_clip.SimpleTokenizer())
    monkeypatch.setattr(_models, "load_model", lambda name, pretrained, device: loaded)


def test_rows(small):
    scores = tpt_fast.score_map(small, CAT, NAMES)
    found = rows(run("map", CAT, *GIVEN, "--json"))
    assert [row["class"] for row in found] == NAMES
    assert sum(row["share"] for row in found) == pytest.approx(1)
    for i, row in enumerate(found):
        assert row["highest"] == scores[i].max() == scores[i, row["row"], row["column"]]
        assert row["mean"] == pytest.approx(scores[i].mean().item(), rel=1e-4)
        assert row["share"] == pytest.approx((scores.argmax(0) == i).float().mean().item())
    assert 0 < max(row["share"] for row in found) < 1


def test_table():
    table = run("map", CAT, *GIVEN).stdout
    shares = [float(line.split("│")[2].strip(" %")) for line in table.splitlines() if line.startswith("│")]
    assert shares == sorted(shares, reverse=True)
    assert len(shares) == 3


def test_options_reach_the_map(small, tmp_path):
    out = tmp_path / "scores.npy"
    options = {"tokens": "raw", "size": 40, "stride": 9}
    given = [text for name, value in options.items() for text in (f"--{name}", value)]
    run("map", f"file://{CAT}", *GIVEN, *given, "--out", out)
    got = np.load(out)
    assert got.dtype == np.float32
    assert np.array_equal(got, tpt_fast.score_map(small, CAT, NAMES, **options))
    run("map", CAT, *GIVEN, "--std", 1, "--out", out)
    assert np.array_equal(np.load(out), tpt_fast.score_map(small, CAT, NAMES, std=1))
    run("map", CAT, *GIVEN, "--precision", "bf16", "--out", out)
    clip = tpt_fast.clip.Clip(small, "bf16")
    assert np.array_equal(np.load(out), tpt_fast.score_map(clip, CAT, NAMES))


def test_prompts(small, tmp_path):
    out, ctx = tmp_path / "scores.npy", torch.randn(4, 64)
    torch.save({"state_dict": {"ctx": ctx}}, tmp_path / "coop.pth")
    run("map", CAT, *GIVEN, "--ctx", tmp_path / "coop.pth", "--out", out)
    assert np.array_equal(np.load(out), tpt_fast.score_map(small, CAT, NAMES, ctx))
    run("map", CAT, *GIVEN, "--tuned", "--out", out)
    tuned = tpt_fast.Tuner(small, NAMES)(CAT).ctx
    assert np.array_equal(np.load(out), tpt_fast.score_map(small, CAT, NAMES, tuned))
    run("map", CAT, *GIVEN, "--tuned", "--ctx", tmp_path / "coop.pth", "--out", out)
    tuned = tpt_fast.Tuner(small, NAMES, tpt_fast.TuneConfig(ctx=ctx))(CAT).ctx
    assert np.array_equal(np.load(out), tpt_fast.score_map(small, CAT, NAMES, tuned))


def test_picture_from_the_command_line(tmp_path):
    run("map", CAT, *GIVEN, "--plot", tmp_path / "map.png")
    assert Image.open(tmp_path / "map.png").size[0] > 500


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--model", "ViT-B-32"], "--classes"),
        (["--classes", "cat"], "the demo model is a ResNet, which has no patch tokens"),
        ([*GIVEN, "--size", "20"], "--size: size: expected 32 to 32768, got 20"),
        ([*GIVEN, "--stride", "40"], "--stride: stride: expected 1 to 32, got 40"),
        ([*GIVEN, "--std", "0"], "--std: std: expected a number above 0"),
        ([*GIVEN, "--tokens", "keys"], "--tokens: tokens: expected one of neighbourhood, raw, got 'keys'"),
        ([*GIVEN, "--precision", "fp64"], "--precision: precision: expected one of"),
        ([*GIVEN, "--ctx", "absent.pth"], "--ctx: ctx:"),
        ([*GIVEN, "--out", "scores.npz"], "scores.npz does not end in .npy"),
        ([*GIVEN, "--out", "absent/scores.npy"], "cannot be written"),
        ([*GIVEN, "--plot", "map.pgn"], "map.pgn ends in none of"),
    ],
)
def test_bad_usage(given, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert message in said(run("map", CAT, *given, code=2))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("tuned", [[], ["--tuned"]])
@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda: demo.load().model, "expected a vision transformer"),
        (lambda: models.clip(vision={"image_size": (48, 32), "layers": 1}), "expected one of square images"),
    ],
)
def test_a_model_of_which_no_maps_are_made(monkeypatch, tuned, make, why):
    loaded = _models.Loaded(make(), open_clip.SimpleTokenizer())
    monkeypatch.setattr(_models, "load_model", lambda name, pretrained, device: loaded)
    monkeypatch.setattr("tpt_fast.tuner.Tuner", None)  # nothing is tuned before
    assert f"--model: model: {why}" in said(run("map", CAT, *GIVEN, *tuned, code=2))


def test_an_image_that_cannot_be_read(tmp_path):
    assert "absent.jpg" in said(run("map", tmp_path / "absent.jpg", *GIVEN, code=1))


# --- the picture


@pytest.fixture
def maps(small):
    return tpt_fast.score_map(small, CAT, NAMES)


def test_plot(maps, tmp_path):
    figure = tpt_fast.plot_map(maps, CAT, NAMES, tmp_path / "map.png")
    assert [axes.get_title() for axes in figure.axes[1:4]] == NAMES
    limits = {drawn.get_clim() for axes in figure.axes[1:4] for drawn in axes.images[1:]}
    assert len(limits) == 1
    photo = figure.axes[0].images[0].get_array()
    assert photo.shape == (266, 400, 3)
    low, high = limits.pop()
    assert maps.min() <= low < high <= maps.max()
    assert Image.open(tmp_path / "map.png").size[0] > 500
    tpt_fast.plot_map(maps, CAT, NAMES, tmp_path / "no ending")
    assert (tmp_path / "no ending.png").exists()


def test_plot_shows_the_highest(maps):
    names = [f"_{i}_ $x$" for i in range(12)]
    many = torch.cat([maps - i for i in range(4)])
    figure = tpt_fast.plot_map(many, CAT, names, classes=4)
    shown = [names.index(axes.get_title()) for axes in figure.axes if axes.get_title()]
    assert shown == sorted(shown)
    assert set(shown) == set(many.flatten(1).amax(1).topk(4).indices.tolist())
    assert len(tpt_fast.plot_map(many, CAT, names).axes) == 8 + 1


def test_plot_of_what_does_not_fit(maps, tmp_path):
    with pytest.raises(ValueError, match=r"scores: expected \[2, 300, 451\] .*, got \[3, 300, 451\]"):
        tpt_fast.plot_map(maps, CAT, NAMES[:2])
    with pytest.raises(ValueError, match=r"scores: expected .*, got list"):
        tpt_fast.plot_map([maps], CAT, NAMES)
    with pytest.raises(ValueError, match="classes: expected 1 or more, got 0"):
        tpt_fast.plot_map(maps, CAT, NAMES, classes=0)
    with pytest.raises(ValueError, match="pgn"):
        tpt_fast.plot_map(maps, CAT, NAMES, tmp_path / "map.pgn")
