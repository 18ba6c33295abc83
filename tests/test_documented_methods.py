"""The code of docs/how-to runs as it stands there."""

import re
from pathlib import Path

import image_sets
import models
import pytest
import torch

import tpt_fast
from tpt_fast import demo
from tpt_fast.evaluation import folders

HOW_TO = Path(__file__).resolve().parent.parent / "docs" / "how-to"


def blocks(page):
    if not HOW_TO.is_dir():
        pytest.skip("there is no documentation here")
    return re.findall(r"```python\n(.*?)```", (HOW_TO / page).read_text("utf-8"), re.S)


@pytest.fixture
def given(monkeypatch, tmp_path):
    """What a page takes for granted: a model, names and a photograph."""
    loaded = demo.load()
    (tmp_path / "photo.jpg").write_bytes((demo.PHOTO_FOLDER / "cat.jpg").read_bytes())
    monkeypatch.chdir(tmp_path)
    return {"model": loaded.model, "names": list(loaded.classnames), "tpt_fast": tpt_fast}


def test_methods_side_by_side(given, capsys):
    several, augmix = blocks("methods.md")
    exec(several, given)
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["tpt", "zero", "mta"]
    crops = given["result"]
    exec(augmix, given)
    assert torch.equal(given["result"].zero_shot_logits, crops.zero_shot_logits)
    assert not torch.equal(given["result"].entropies[1:], crops.entropies[1:])


def test_learned_prompts(given, tmp_path, capsys):
    width, folder = given["model"].token_embedding.weight.shape[1], tmp_path / "prompt_learner"
    folder.mkdir()
    net = {"linear1.weight": (8, given["model"].text_projection.shape[1]), "linear1.bias": (8,)}
    net |= {"linear2.weight": (width, 8), "linear2.bias": (width,)}
    state = {"ctx": torch.randn(4, width) * 0.02}
    torch.save({"state_dict": state, "epoch": 50}, folder / "model.pth.tar-50")
    state |= {f"meta_net.{name}": torch.randn(shape) * 0.02 for name, shape in net.items()}
    torch.save({"state_dict": state, "epoch": 10}, folder / "model.pth.tar-10")
    coop, cocoop, published, save, words = blocks("learned-prompts.md")
    exec(coop, given)
    assert torch.equal(given["result"].ctx_init, state["ctx"])
    exec(cocoop, given)
    assert not torch.equal(given["result"].ctx_init, state["ctx"])
    exec(published, given)
    assert not given["tuner"].classes.start.normalised
    exec(save, given)
    assert torch.equal(given["again"].zero_shot_logits, given["result"].logits)
    capsys.readouterr()
    exec(words, given)
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["a", "photo", "of", "a"]


def test_training(given, capsys):
    files = demo.PHOTOS
    given |= {"paths": [demo.PHOTO_FOLDER / file for file in files]}
    given["labels"] = [given["names"].index(name) for name in files.values()]
    train, nameless = blocks("training.md")
    exec(train.replace("epochs=20", "epochs=2"), given)
    assert float(capsys.readouterr().out.split()[0]) > 0
    assert torch.equal(given["result"].ctx_init, given["trained"].ctx)
    assert torch.equal(tpt_fast.load_ctx("ctx.safetensors"), tpt_fast.load_ctx("model.pth.tar-20"))
    exec(nameless, given)
    assert 0 < float(given["concept"](["photo.jpg"])) < 1
    tpt_fast.tune.cache_clear()


def test_own_method(given, capsys):
    (code,) = blocks("own-method.md")
    body = code.partition("def __call__")[2].partition("\n\n")[0]
    assert body.count("\n") < 10
    exec(code, given)
    result = given["result"]
    label, own, view = capsys.readouterr().out.rsplit(maxsplit=2)
    best = result.by_method["most confident"]
    assert (label, own, view) == (result.label, best.label, str(best.view))
    assert best.probs.max() >= best.zero_shot_probs.max()


def test_own_objective(given):
    for code in blocks("own-objective.md"):
        exec(code, given)
    plain, spread = (
        tpt_fast.tune(given["model"], "photo.jpg", given["names"], objective=given[name])
        for name in ("gentler", "spread")
    )
    assert not plain.grad.equal(spread.grad)
    tpt_fast.tune.cache_clear()


def test_maps(given):
    """By a small transformer: the demo model is a ResNet, which the page says is refused."""
    given |= {"model": models.clip(std=0.2), "S": 32, "paths": ["photo.jpg"] * 2}
    for code in blocks("maps.md"):
        exec(code, given)
    assert Path("map.png").exists()
    assert given["fine"].shape == given["tuned"].shape == given["scores"].shape == (3, 300, 451)
    assert torch.equal(*given["maps"])
    assert not given["tuned"].equal(given["scores"])
    tpt_fast.tune.cache_clear()


def test_image_sets(given, capsys, monkeypatch, tmp_path):
    image_sets.as_small(monkeypatch, "imagenet_a")
    image_sets.make_kin("imagenet_a", tmp_path / "datasets" / "imagenet-a")
    given["images"] = photos = folders.open_folder(_photos(tmp_path / "photos"))
    opened, table, look = blocks("image-sets.md")
    exec(opened, given)
    assert capsys.readouterr().out.splitlines()[0] == "imagenet_a 200 200 ()"
    (tmp_path / "other.jpg").write_bytes(image_sets.JPEG)
    exec(table, given)
    assert capsys.readouterr().out == "['cat', 'dog']\n"
    given["images"] = photos
    exec(look, given)
    assert capsys.readouterr().out.endswith(" None\n")
    assert given["found"].images == len(photos)


def _photos(folder):
    """A folder for each class of the demo's photographs."""
    for file, name in demo.PHOTOS.items():
        image_sets.write(folder / name.replace(" ", "_") / file, (demo.PHOTO_FOLDER / file).read_bytes())
    return folder
