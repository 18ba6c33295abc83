"""The recipe of the demo model: its data in both forms, and a run that is stopped and resumed."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("open_clip")

from open_clip.modified_resnet import ModifiedResNet

from recipes.demo import augment, captions
from recipes.demo.data import Split, hold_out, load_split
from recipes.demo.image import ImageOptions, ImageTraining, encode
from recipes.demo.text import Texts
from tpt_fast.demo import CLASSES, CLASSNAMES

WNIDS = ("n02123045", "n07920052")
OTHER = "n09999999"  # of a class that is not asked for
COLOURS = {WNIDS[0]: (250, 0, 0), WNIDS[1]: (0, 0, 250), OTHER: (0, 250, 0)}


def picture(wnid: str) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (64, 64), COLOURS[wnid]).save(file, "JPEG")
    return file.getvalue()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "wnids.txt").write_text("\n".join(COLOURS) + "\n")
    (tmp_path / "val" / "images").mkdir(parents=True)
    lines = []
    for i, wnid in enumerate([OTHER, WNIDS[1], WNIDS[0], WNIDS[1]]):
        (tmp_path / "val" / "images" / f"val_{i}.JPEG").write_bytes(picture(wnid))
        lines.append(f"val_{i}.JPEG\t{wnid}\t0\t0\t63\t63\n")
        images = tmp_path / "train" / wnid / "images"
        images.mkdir(parents=True, exist_ok=True)
        (images / f"{wnid}_{i}.JPEG").write_bytes(picture(wnid))
    (tmp_path / "val" / "val_annotations.txt").write_text("".join(lines))
    return tmp_path


@pytest.fixture
def packed(tmp_path: Path) -> Path:
    order = [1, 0, 2, 1]  # places in COLOURS
    names = list(COLOURS)
    files = [picture(names[place]) for place in order]
    offsets = np.cumsum([0, *map(len, files)])
    everything = np.frombuffer(b"".join(files), np.uint8)
    for split in ("train", "val"):
        np.savez(tmp_path / f"tiny_imagenet_{split}.npz", webp=everything, offsets=offsets, labels=order, wnids=names)
    return tmp_path


@pytest.mark.parametrize("form", ["folder", "packed"])
@pytest.mark.parametrize("train", [True, False])
def test_images_are_those_of_the_classes_that_were_asked_for(form: str, train: bool, request) -> None:
    split = load_split(request.getfixturevalue(form), train, WNIDS)
    assert split.images.shape == (3, 64, 64, 3)
    assert sorted(split.labels.tolist()) == [0, 1, 1]
    brightest = split.images[:, 32, 32].float().argmax(1)  # red or blue
    assert (brightest == torch.where(split.labels == 0, 0, 2)).all()


def test_data_that_is_not_there(tmp_path: Path, packed: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"expected tiny_imagenet_val\.npz or the files of tiny-imagenet-200"):
        load_split(tmp_path / "absent", train=False)
    with pytest.raises(ValueError, match="n01443537"):
        load_split(packed, train=True)


def test_every_class_has_its_names_and_two_kinds() -> None:
    assert len(CLASSES) == len(set(CLASSNAMES)) == 100
    assert all(c.wnid.startswith("n") and all(c.synonyms) and len(c.kinds) == 2 for c in CLASSES)
    for level in (0, 1):
        names, kind_of = captions.kinds(level)
        assert [names[kind] for kind in kind_of] == [c.kinds[level] for c in CLASSES]


def test_captions_of_a_look_are_openais_templates() -> None:
    assert len(captions.TEMPLATES) == 80
    assert list(captions.LOOKS)[:-1] == list(augment.LOOKS)
    assert all(captions.LOOKS.values())
    told = [template for of_look in captions.LOOKS.values() for template in of_look]
    assert len(told) == len(set(told)) == 80 - len(captions.GENERIC)
    assert captions.PROMPT in captions.GENERIC


def test_the_compact_vocabulary_spells_every_caption() -> None:
    texts = Texts()
    drawn = captions.of_classes("a blurry photo of the {}.", torch.Generator().manual_seed(0))
    ids = texts(drawn)
    assert torch.equal(texts.token_ids[ids], texts.tokenizer(drawn)[:, : ids.shape[1]])


@pytest.mark.parametrize("look", range(len(augment.LOOKS)))
def test_views_depend_on_the_generator_alone(look: int) -> None:
    images = torch.randint(256, (3, 64, 64, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    looks = torch.full((3,), look)
    once, again, other = (
        augment.random_views(images, 32, (0.3, 1.0), looks, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)
    )
    assert once.shape == (3, 3, 32, 32)
    assert torch.isfinite(once).all()
    assert torch.equal(once, again)
    assert not torch.equal(once, other)


def training(checkpoint: Path, epochs: float) -> ImageTraining:
    torch.manual_seed(0)
    visual = ModifiedResNet([1, 1, 1, 1], 16, 4, 64, 8)
    options = ImageOptions(epochs=epochs, sizes=((0, 32), (0.5, 64)), batch=8, threads=2, save_every=1)
    return ImageTraining(visual, 2, options, checkpoint)


def test_a_resumed_run_is_the_uninterrupted_one(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (40, 64, 64, 3), dtype=torch.uint8, generator=generator)
    train, held = hold_out(Split(images, torch.arange(40) % 2), 8, seed=0)

    whole = training(tmp_path / "whole.ckpt", epochs=1)
    assert whole.run(train, held, tmp_path / "log.jsonl")
    first = training(tmp_path / "parts.ckpt", epochs=1)
    for step in range(2):  # of four
        first._step(train, first._batch(32), 32, (step + 1) / 100)
        first.step += 1
    first.save()
    second = training(tmp_path / "parts.ckpt", epochs=1)
    assert second.step == 2
    assert second.run(train, held, tmp_path / "log.jsonl")
    for name, p in whole.parameters.items():
        assert torch.equal(p, second.parameters[name]), name
    assert torch.equal(whole.averaged().classes, second.averaged().classes)


def test_features_are_those_of_open_clips_own_code() -> None:
    torch.manual_seed(0)
    visual = ModifiedResNet([1, 1, 1, 1], 16, 4, 64, 8).eval()
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        ours, theirs = encode(visual, x), torch.nn.functional.normalize(visual(x), dim=-1)
    assert (ours * theirs).sum(1).min() > 0.999  # bfloat16 has 8 bits
