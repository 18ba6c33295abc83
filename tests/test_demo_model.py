"""The demo model that ships with the package: small, whole, quick to load, and as accurate as its README says."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("open_clip")

from safetensors import safe_open

from recipes.demo import captions, corruptions, evaluate
from recipes.demo.augment import plain
from recipes.demo.data import load_split
from tpt_fast import TextEncoder, TuneConfig, Tuner, demo
from tpt_fast.cli._models import load_demo
from tpt_fast.demo import weights

CHECKOUT = Path(__file__).resolve().parents[1]
DATA = Path(os.environ.get("TPT_FAST_DEMO_DATA", CHECKOUT.parent / "shared" / "data"))


@pytest.fixture(scope="module")
def loaded() -> demo.Demo:
    return demo.load()


@torch.no_grad()
def features(loaded: demo.Demo, prompt: str = captions.PROMPT) -> torch.Tensor:
    texts = [prompt.format(name) for name in loaded.classnames]
    return loaded.model.encode_text(loaded.tokenizer(texts), normalize=True)


def test_is_a_standard_clip_for_64_pixels(loaded: demo.Demo) -> None:
    assert type(loaded.model).__name__ == "CLIP"
    assert not loaded.model.training
    assert loaded.model.visual.image_size == 64
    assert loaded.model.context_length == 77
    assert loaded.model.visual.image_mean == loaded.preprocess["mean"]
    assert all(p.dtype == torch.float32 and torch.isfinite(p).all() for p in loaded.model.parameters())


def test_loading_leaves_the_random_generator_alone() -> None:
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    demo.load()
    assert torch.equal(torch.rand(4), expected)


def test_classes_come_with_their_wordnet_ids(loaded: demo.Demo) -> None:
    assert loaded.classnames == demo.CLASSNAMES
    assert len(demo.WNIDS) == len(set(demo.WNIDS)) == len(demo.CLASSNAMES) == 100
    assert dict(zip(demo.WNIDS, demo.CLASSNAMES))["n02123045"] == "tabby cat"


def test_both_towers_run_by_their_executors(loaded: demo.Demo) -> None:
    tuner = Tuner(loaded.model, loaded.classnames, TuneConfig(n_views=4))
    engines = tuner(demo.PHOTO_FOLDER / "cat.jpg").engines
    assert (engines["image"], engines["text"]) == ("resnet", "packed")


def test_folder_stays_under_8_megabytes() -> None:
    files = [f for f in weights.FOLDER.rglob("*") if f.is_file() and f.suffix != ".pyc"]
    assert sum(f.stat().st_size for f in files) < 8e6
    assert sum(f.stat().st_size for f in demo.PHOTO_FOLDER.iterdir()) < 500e3


def test_saved_weights_are_read_back_to_half_a_step_of_int8(loaded: demo.Demo, tmp_path: Path) -> None:
    state, ids = loaded.model.state_dict(), torch.arange(7)
    path = tmp_path / "model.safetensors"
    weights.save_weights(state | {"token_embedding.weight": state["token_embedding.weight"][ids]}, ids, path)
    again = weights.load_weights(weights.build(weights.read_config()), path).state_dict()
    for name, value in state.items():
        if value.ndim < 2:
            assert torch.equal(again[name], value), name
        elif name.startswith("visual."):
            rows, read = value.flatten(1), again[name].flatten(1)
            step = rows.abs().amax(1, keepdim=True) / 127
            assert ((read - rows).abs() <= 0.501 * step).all(), name
        elif name != "token_embedding.weight":
            assert torch.equal(again[name], value.half().float()), name


def test_unused_rows_are_regenerated_and_used_rows_are_not(loaded: demo.Demo) -> None:
    with safe_open(weights.WEIGHTS, "pt") as file:
        ids = file.get_tensor("token_ids").long()
        assert file.metadata()["token_seed"] == str(weights.TOKEN_SEED)
    rows = loaded.model.token_embedding.weight
    fresh = weights.token_table(*rows.shape)
    unused = torch.ones(len(rows), dtype=torch.bool)
    unused[ids] = False
    assert torch.equal(rows[unused], fresh[unused])
    assert not torch.isclose(rows[ids], fresh[ids]).all(1).any()
    # The bits that training started from: another torch or another CPU has to draw the same.
    assert fresh[0, :3].view(torch.int32).tolist() == [-1128730680, -1131855535, -1165020258]


def test_every_training_caption_uses_stored_rows(loaded: demo.Demo) -> None:
    with safe_open(weights.WEIGHTS, "pt") as file:
        ids = file.get_tensor("token_ids").long()
    assert torch.isin(loaded.tokenizer(captions.all_captions()), ids).all()


def test_the_words_around_the_name_matter(loaded: demo.Demo) -> None:
    similarity = (features(loaded) * features(loaded, "a dark photo of a {}.")).sum(1)
    assert (similarity < 0.999).all()


def test_photographs_show_what_tuning_does_and_where_it_ends(loaded: demo.Demo) -> None:
    tuner = Tuner(loaded.model, loaded.classnames)
    answers = {name: tuner(demo.PHOTO_FOLDER / name) for name in demo.PHOTOS}
    right = [(r.zero_shot_label == demo.PHOTOS[name], r.label == demo.PHOTOS[name]) for name, r in answers.items()]
    assert right == [(False, True), *[(True, True)] * 6, (False, False)]


def test_every_photograph_has_its_source() -> None:
    files = {file.name for file in demo.PHOTO_FOLDER.glob("*.jpg")}
    lines = (demo.PHOTO_FOLDER / "README.md").read_text(encoding="utf-8").splitlines()
    assert {line.split("`")[1] for line in lines if line.startswith("| `")} == files
    assert set(demo.PHOTOS) <= files
    assert set(demo.PHOTOS.values()) <= set(demo.CLASSNAMES)
    for file in files:
        with Image.open(demo.PHOTO_FOLDER / file) as image:
            assert max(image.size) <= 500


@pytest.mark.parametrize("kind", corruptions.KINDS)
def test_corruptions_are_deterministic(kind: str) -> None:
    images = np.random.default_rng(0).integers(0, 256, (4, 32, 32, 3), np.uint8)
    before = images.copy()
    once = corruptions.corrupt(images, kind, 3, seed=1)
    assert once.dtype == np.uint8
    assert once.shape == images.shape
    assert (images == before).all()
    assert (once == corruptions.corrupt(images, kind, 3, seed=1)).all()
    assert (once[:2] == corruptions.corrupt(images[:2], kind, 3, seed=1)).all()
    assert (once == images).all() == (kind == "clean")


def test_corruptions_reject_what_they_cannot_do() -> None:
    images = np.zeros((1, 32, 32, 3), np.uint8)
    for bad in (dict(kind="fog"), dict(kind="blur", severity=6), dict(kind="blur", severity=0)):
        with pytest.raises(ValueError):
            corruptions.corrupt(images, **bad)
    with pytest.raises(ValueError):
        corruptions.corrupt(images.astype(np.float32), "clean")


def test_paired_interval() -> None:
    before = np.arange(1000) < 700
    assert evaluate.paired_interval(before, before) == (0, 0, 0)
    difference, low, high = evaluate.paired_interval(before, np.arange(1000) < 730)
    assert difference == pytest.approx(3)
    assert 1.8 < low < 2.2
    assert 3.8 < high < 4.2


@pytest.mark.host
def test_the_tables_are_made_of_the_rows() -> None:
    rows = json.loads((CHECKOUT / "benchmarks" / "results" / "demo_accuracy.json").read_text())
    digest = hashlib.sha256(weights.WEIGHTS.read_bytes()).hexdigest()
    assert all(digest.startswith(row["model"]) for row in rows)
    assert {row["kind"] for row in rows} == set(corruptions.KINDS)
    assert evaluate.side_by_side(rows) in (CHECKOUT / "README.md").read_text()
    assert evaluate.side_by_side(rows, intervals=True) in (CHECKOUT / "tpt_fast" / "demo" / "README.md").read_text()


@torch.no_grad()
def test_accuracy(loaded: demo.Demo) -> None:
    try:
        validation = load_split(DATA, train=False)
    except FileNotFoundError:
        pytest.skip(f"no Tiny ImageNet at {DATA}; TPT_FAST_DEMO_DATA may name another folder")
    text, hits = features(loaded), 0
    for images, labels in zip(validation.images.split(250), validation.labels.split(250)):
        image = loaded.model.encode_image(plain(images, loaded.model.visual.image_size), normalize=True)
        hits += int(((image @ text.T).argmax(1) == labels).sum())
    assert len(validation.labels) in (2471, 5000)  # of the packed files, of the folder
    assert 100 * hits / len(validation.labels) >= 50


def test_the_commands_own_copy_of_the_model_is_read_too():
    found = load_demo()
    assert TextEncoder(found.model, ["teapot"], tokenizer=found.tokenizer).engine == "packed"
