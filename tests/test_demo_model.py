"""The demo model that ships with the package: small, whole, quick to load, and as accurate as its README says."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("open_clip")

from open_clip.transform import PreprocessCfg, image_transform_v2
from safetensors import safe_open

from recipes.demo import captions, corruptions, evaluate
from recipes.demo.data import load_split
from tpt_fast import TextEncoder, demo
from tpt_fast.cli._models import load_model
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


def test_is_a_standard_clip_for_32_pixels(loaded: demo.Demo) -> None:
    assert type(loaded.model).__name__ == "CLIP"
    assert not loaded.model.training
    assert loaded.model.visual.image_size == (32, 32)
    assert loaded.model.context_length == 77
    assert loaded.model.visual.image_mean == loaded.preprocess["mean"]
    assert all(p.dtype == torch.float32 and torch.isfinite(p).all() for p in loaded.model.parameters())


def test_loading_leaves_the_random_generator_alone() -> None:
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    demo.load()
    assert torch.equal(torch.rand(4), expected)


def test_folder_stays_under_8_megabytes() -> None:
    files = [f for f in weights.FOLDER.rglob("*") if f.is_file() and f.suffix != ".pyc"]
    assert sum(f.stat().st_size for f in files) < 8e6
    assert sum(f.stat().st_size for f in demo.PHOTO_FOLDER.iterdir()) < 400e3


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
    assert torch.isin(loaded.tokenizer(captions.all_captions(loaded.classnames)), ids).all()


def test_the_words_around_the_name_matter(loaded: demo.Demo) -> None:
    similarity = (features(loaded) * features(loaded, "a dark photo of a {}.")).sum(1)
    assert (similarity < 0.999).all()


@torch.no_grad()
def test_photographs(loaded: demo.Demo) -> None:
    preprocess = image_transform_v2(PreprocessCfg(**loaded.preprocess), is_train=False)
    files = {f.name for f in demo.PHOTO_FOLDER.glob("*.jpg")}
    assert files == set(demo.PHOTOS)
    for name, label in demo.PHOTOS.items():
        with Image.open(demo.PHOTO_FOLDER / name) as image:
            assert max(image.size) <= 500
            view = preprocess(image)[None]
        scores = loaded.model.encode_image(view, normalize=True) @ features(loaded).T
        if label is not None:
            assert loaded.classnames.index(label) in scores[0].topk(3).indices.tolist()


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


@torch.no_grad()
def test_accuracy(loaded: demo.Demo) -> None:
    if not (DATA / "cifar10_test.npz").is_file():
        pytest.skip(f"no cifar10_test.npz at {DATA}; TPT_FAST_DEMO_DATA may name another folder")
    test = load_split(DATA, train=False)
    mean, std = (torch.tensor(loaded.preprocess[k]).view(3, 1, 1) for k in ("mean", "std"))
    hits = 0
    for images, labels in zip(test.images.split(500), test.labels.split(500)):
        image = loaded.model.encode_image((images.permute(0, 3, 1, 2).float() / 255 - mean) / std, normalize=True)
        hits += int(((image @ features(loaded).T).argmax(1) == labels).sum())
    assert len(test.labels) == 5000
    assert 100 * hits / len(test.labels) >= 70


def test_the_commands_own_copy_of_the_model_is_read_too():
    found = load_model(None, None, "cpu")
    assert TextEncoder(found.model, ["cat"], tokenizer=found.tokenizer).engine == "packed"
