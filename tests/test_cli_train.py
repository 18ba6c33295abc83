"""``tpt-fast train``."""

import json
import shutil

import image_sets
import pytest
import torch
from command_line import CAT, FEW, one_demo_model, plain_terminal, rows, run, said  # noqa: F401 (fixtures)

import tpt_fast
from tpt_fast import demo
from tpt_fast.evaluation.sets import open_set
from tpt_fast.prompting.checkpoint import read_header

CLASSES = {"arch": ["arch.jpg"], "cat": ["cat.jpg", "koala.jpg", "bee.jpg"], "red_panda": ["red_panda.jpg", "dam.jpg"]}
SHORT = ["--views", 2, "--epochs", 2, "--n-ctx", 4]


@pytest.fixture
def folder(tmp_path):
    for name, files in CLASSES.items():
        (tmp_path / "set" / name).mkdir(parents=True)
        for file in files:
            shutil.copy(demo.PHOTO_FOLDER / file, tmp_path / "set" / name)
    (tmp_path / "set" / "cat" / "notes.txt").write_text("no image")
    return tmp_path / "set"


@pytest.mark.parametrize("kind", ["coop", "cocoop"])
def test_from_a_folder_to_a_prompt_that_classifies(folder, tmp_path, kind):
    out, kept = tmp_path / "model.pth.tar-2", tmp_path / "ctx.safetensors"
    result = run("train", kind, "--set", folder, "--out", out, "--save-ctx", kept, "--shots", 2, *SHORT)
    assert [line.split(":")[0] for line in result.stdout.splitlines()] == ["epoch 1", "epoch 2"]
    assert "5 images, 3 classes" in said(result)
    assert read_header(kept)["model"] == "the demo model"
    first, second = (tpt_fast.load_ctx(file) for file in (out, kept))
    assert torch.equal(*((first, second) if kind == "coop" else (first.ctx, second.ctx)))
    (row,) = rows(run("tune", CAT, "--ctx", kept, "--classes", "arch,cat,red panda", "--json", *FEW))
    assert row["label"] in CLASSES | {"red panda": None}
    assert "is there; --resume goes on" in said(run("train", kind, "--set", folder, "--out", out, *SHORT, code=2))
    again = run("train", kind, "--set", folder, "--out", out, "--shots", 2, *SHORT, "--resume")
    assert again.stdout == result.stdout
    message = said(
        run("train", kind, "--set", folder, "--out", out, "--shots", 2, *SHORT, "--lr", 1, "--resume", code=2)
    )
    assert "lr 0.002 there, 1.0 here" in message


def test_what_it_is_given_wrong(folder, tmp_path):
    out = tmp_path / "out"
    command = ["train", "coop", "--set", folder, "--out", out]
    (tmp_path / "names.txt").write_text("one\ntwo\n")
    for more, message in (
        (["--classes-file", tmp_path / "names.txt"], "--set: set: "),
        (["--epochs", 0], "--epochs: epochs: expected 1 or more"),
        (["--pretrained", "openai"], "it goes with --model"),
        (["--save-ctx", tmp_path / "none" / "x"], "--save-ctx: "),
    ):
        assert message in said(run(*command, *more, code=2))
    assert "expected one of coop, cocoop" in said(run("train", "maple", "--set", folder, "--out", out, code=2))
    assert "one context for all" in said(run("train", "cocoop", "--csc", "--set", folder, "--out", out, code=2))
    (folder / "torn").mkdir()
    (folder / "torn" / "torn.jpg").write_bytes(b"\xff\xd8\xff")
    assert "torn.jpg" in said(run(*command, *SHORT, code=1))
    assert not out.exists()
    empty = tmp_path / "nothing"
    empty.mkdir()
    assert "expected a folder for each class" in said(run("train", "coop", "--set", empty, "--out", out, code=2))
    for test_only in ("imagenet_a", "food101-official", "cifar10"):
        message = said(run("train", "coop", "--set", test_only, "--root", empty, "--out", out, code=2))
        assert "of its training images name the folder" in message


def test_the_training_part_of_coops_split(tmp_path, monkeypatch):
    """By the set's name: images that the test part does not have, and none that it has."""
    test = image_sets.rows_of("dtd")
    train = [(f"{path[:-4]}_train{i}.jpg", label, name) for path, label, name in test for i in range(2)]
    image_sets.as_small(monkeypatch, "dtd", test)
    top = image_sets.make_fine("dtd", tmp_path, "dtd/images", test)
    for path, *_ in train:
        shutil.copy(CAT, image_sets.write(tmp_path / "dtd" / "images" / path))
    split = {"train": train, "val": [], "test": test}
    image_sets.write(top / "split_zhou_DescribableTextures.json", json.dumps(split))
    found = open_set("dtd", tmp_path, part="train")
    assert found.name == "dtd-train"
    assert {found.id(i) for i in range(len(found))} == {path for path, *_ in train}
    assert len(open_set("dtd", tmp_path)) == len(test)
    command = ["train", "coop", "--set", "dtd", "--root", tmp_path, "--out", tmp_path / "out", "--shots", 1, *SHORT]
    assert f"{len(found.classnames)} images, {len(found.classnames)} classes" in said(run(*command))
    with pytest.raises(ValueError, match="part: expected one of test, train"):
        open_set("dtd", tmp_path, part="val")
