"""The published code's own answers (golden/), on a small seeded CLIP."""

import json

import numpy as np
import open_clip
import pytest
import safetensors.torch
import torch

from tpt_fast import TuneConfig, Tuner, load_image, make_views
from tpt_fast.views.make import CLIP_MEAN, CLIP_STD

CASES = ["end1", "end3", "coop1", "middle1"]


@pytest.fixture(scope="module")
def model(golden_dir):
    model = open_clip.model.CLIP(**json.loads((golden_dir / "config.json").read_text()))
    state = safetensors.torch.load_file(golden_dir / "model.safetensors")
    model.load_state_dict({name: value.float() for name, value in state.items()}, strict=False)
    assert not [name for name, _ in model.named_parameters() if name not in state]
    return model


@pytest.fixture(scope="module")
def boxes(golden_dir):
    return torch.from_numpy(np.load(golden_dir / "boxes.npy"))


def tuner_of(case, model, engine):
    template, options = str(case["ctx_template"]), {}
    if template.startswith("<"):  # a given context in place of the words' embeddings
        template = "a photo of a"
    if not np.array_equal(case["ctx_init"], initial_words(model, template)):
        options["ctx"] = torch.from_numpy(case["ctx_init"])
    config = TuneConfig(
        rho=float(case["rho"]),
        steps=int(case["steps"]),
        lr=float(case["lr"]),
        ctx_init=template,
        engine=engine,
        **options,
    )
    return Tuner(model, [str(name) for name in case["classnames"]], config)


def initial_words(model, template):
    ids = open_clip.tokenizer.SimpleTokenizer()([template.replace("[CLS]", "")])[0]
    words = ids[1 : int(ids.argmax())]
    return model.token_embedding(words).detach().numpy()


def assert_equal_to(case, result):
    assert result.status == "tuned"
    assert result.selected.tolist() == case["selected"].tolist()
    for name, got in [
        ("entropies", result.entropies),
        ("loss", torch.tensor(result.loss)),
        ("ctx_init", result.ctx_init),
    ]:
        assert_close(name, got, case[name])
    for name, got in [("grad", result.grad), ("ctx", result.ctx), ("logits", result.logits)]:
        assert_close(name, got, case[name].reshape(got.shape))
    assert_close("zero_shot_logits", result.zero_shot_logits, case["logits_before"][0])


def assert_close(name, got, want):
    want = torch.as_tensor(np.asarray(want)).float()
    error = (got - want).abs().max() / want.abs().max()
    assert error < 1e-4, f"{name}: off by {error:.1e} of the largest value"


@pytest.mark.parametrize("engine", ["module", "auto"])
@pytest.mark.parametrize("name", CASES)
def test_from_the_published_views(name, engine, golden_dir, model):
    case = np.load(golden_dir / "cases" / f"{name}.npz")
    pixels = torch.from_numpy(np.load(golden_dir / "views_u8.npy")).float() / 255
    views = (pixels - torch.tensor(CLIP_MEAN)[:, None, None]) / torch.tensor(CLIP_STD)[:, None, None]
    assert_equal_to(case, tuner_of(case, model, engine).tune_views(views))


@pytest.mark.parametrize("name", CASES)
def test_from_the_photograph(name, golden_dir, model, boxes):
    case = np.load(golden_dir / "cases" / f"{name}.npz")
    assert_equal_to(case, tuner_of(case, model, "auto")(golden_dir / "photo.jpg", boxes=boxes))


def test_views_of_the_photograph_bit_for_bit(golden_dir, boxes):
    views = make_views(load_image(golden_dir / "photo.jpg"), size=96, boxes=boxes)
    pixels = torch.from_numpy(np.load(golden_dir / "views_u8.npy")).float() / 255
    mean, std = (torch.tensor(v)[:, None, None] for v in (CLIP_MEAN, CLIP_STD))
    assert torch.equal(views, (pixels - mean) / std)
