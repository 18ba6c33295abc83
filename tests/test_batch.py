"""Several images in one pass against one at a time."""

import math

import bounds
import models
import pytest
import torch
from PIL import Image

from tpt_fast import TuneConfig, Tuner
from tpt_fast.demo import PHOTO_FOLDER

pytestmark = pytest.mark.numerics

NAMES = ["cat", "dog", "sports car", "goldfish", "dog"]


@pytest.fixture(scope="module")
def model():
    return models.clip(std=0.15)


@pytest.fixture(scope="module")
def images():
    """Different pictures of different sizes and kinds."""
    small = Image.open(PHOTO_FOLDER / "rocket.jpg").convert("RGB").resize((70, 130))
    return [PHOTO_FOLDER / "cat.jpg", small, (255 * torch.rand(33, 40, 3)).byte()]


def tuner(model, **options):
    return Tuner(model, NAMES, TuneConfig(n_views=8, rho=0.4, **options))


@pytest.fixture(scope="module")
def allowed(model, images):
    """What rounding does to an answer for one of the images; for the others and other contexts it is alike."""
    views = tuner(model)(images[0], keep_views=True).views
    return [bounds.answers(model, views, NAMES, rho=0.4, steps=max(1, steps)) for steps in range(3)]


def agree(many, single, allowed, steps):
    bounds.assert_same_answer(many, single, allowed[steps], steps=steps)
    assert (many.status, many.classnames, many.engines) == (single.status, single.classnames, single.engines)


@pytest.mark.parametrize("options", [{}, {"engine": "module"}, {"ctx": "specific"}], ids=str)
@pytest.mark.parametrize("steps", [0, 1, 2])
def test_equals_one_at_a_time(model, images, allowed, steps, options):
    if options.get("ctx") == "specific":
        options = {"ctx": 0.1 * torch.randn(len(NAMES), 3, 64)}
    single = tuner(model, steps=steps, **options)
    many = single.tune_batch(images, keep_views=True)
    assert len(many) == 3
    for got, image in zip(many, images, strict=True):
        want = single(image, keep_views=True)
        assert torch.equal(got.views, want.views)
        agree(got, want, allowed, steps)
    assert not torch.equal(many[0].logits, many[1].logits)
    if steps:
        assert not torch.equal(many[0].ctx, many[1].ctx)


@pytest.mark.parametrize("engine", ["auto", "module"])
def test_an_answer_on_several_threads_is_the_same_but_for_rounding(model, images, allowed, threads, engine):
    alone = tuner(model, engine=engine)(images[0])
    for n in (2, 3):
        threads(n)
        agree(tuner(model, engine=engine)(images[0]), alone, allowed, 1)


def test_images_that_do_not_fit_together_are_tuned_in_parts(model, images, allowed, monkeypatch):
    single = tuner(model, steps=2)
    monkeypatch.setattr("tpt_fast.tuner.free_bytes", lambda device: 0)
    for got, image in zip(single.tune_batch(images), images, strict=True):
        agree(got, single(image), allowed, 2)


def test_one_image_is_skipped_and_the_others_are_not(model, images, allowed):
    """An objective that is not finite for one of the images."""
    config, bad = TuneConfig(n_views=8, rho=0.4, steps=2), []

    def objective(logits):
        loss = torch.distributions.Categorical(logits=logits).entropy().mean()
        return loss * math.inf if bad and torch.allclose(logits[0], bad[0], atol=1e-3) else loss

    tuner = Tuner(model, NAMES, config, objective=objective)
    fine = tuner.tune_batch(images)
    assert [result.status for result in fine] == ["tuned"] * 3
    bad.append(fine[1].zero_shot_logits)
    found = tuner.tune_batch(images)
    assert [result.status for result in found] == ["tuned", "skipped", "tuned"]
    assert torch.equal(found[1].ctx, found[1].ctx_init)
    assert torch.equal(found[1].logits, found[1].zero_shot_logits)
    assert not found[1].grad.isfinite().all()
    agree(found[0], fine[0], allowed, 2)
    agree(found[2], fine[2], allowed, 2)


def test_timings_are_shares_of_the_batch(model, images):
    found = tuner(model).tune_batch(images)
    assert found[0].timings == found[2].timings
    stages = {name: seconds for name, seconds in found[0].timings.items() if name != "total"}
    assert {"load", "views", "encode", "text forward"} < stages.keys()
    assert sum(stages.values()) == pytest.approx(found[0].timings["total"])


def test_messages(model, images, tmp_path):
    single = tuner(model)
    assert single.tune_batch([]) == []
    (tmp_path / "empty.jpg").touch()
    with pytest.raises(ValueError, match=r"^images\[1\]: image: .*empty.jpg is an empty file"):
        single.tune_batch([images[0], tmp_path / "empty.jpg"])
    with pytest.raises(FileNotFoundError, match=r"images\[2\]: image: cannot read .*missing.jpg"):
        single.tune_batch([images[0], images[1], tmp_path / "missing.jpg"])
    with pytest.raises(TypeError, match=r"^images\[0\]: image: expected a path"):
        single.tune_batch([7])
    for wrong in ("cat.jpg", torch.zeros(2, 3, 32, 32), iter(images)):
        with pytest.raises(TypeError, match="images: expected a list of images, got"):
            single.tune_batch(wrong)
