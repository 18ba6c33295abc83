"""CoOp and CoCoOp trained here: against plain PyTorch, stopped and gone on with, and read back."""

import math

import bounds
import models
import numpy as np
import open_clip
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy, normalize
from torch.optim.lr_scheduler import CosineAnnealingLR
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as picture

import tpt_fast
from tpt_fast import TextEncoder, TuneConfig, Tuner, demo
from tpt_fast.clip import Clip
from tpt_fast.methods.published import context_in_place
from tpt_fast.prompting import CoCoOp, train
from tpt_fast.prompting.examples import encode_examples
from tpt_fast.prompting.train import Recipe
from tpt_fast.text.classes import Classes
from tpt_fast.views.crops import draw_boxes
from tpt_fast.views.decode import load_image

NAMES = ["cat", "dog", "sports car", "goldfish", "dog"]  # one comes twice
WORDS = "a photo of a"


def examples(count=11, views=3, width=32, dtype=torch.float32):
    """Features [N, V, D] around one direction a class, and labels."""
    random = torch.Generator().manual_seed(3)
    labels = torch.arange(count) % len(NAMES)
    centres = torch.randn(len(NAMES), 1, width, generator=random, dtype=torch.float64)
    features = centres[labels] + 0.5 * torch.randn(count, views, width, generator=random, dtype=torch.float64)
    return normalize(features, dim=-1).to(dtype), labels


@pytest.fixture(scope="module")
def model():
    return models.clip(std=0.2)


@pytest.fixture(scope="module")
def clip(model):
    return Clip(model)


def run(trainer, clip, *, data=None, **options):
    features, labels = data or examples()
    return trainer(clip, features, labels, NAMES, progress=False, **options)


# --- what is computed


@pytest.mark.parametrize(("epochs", "warmup"), [(50, 1), (10, 1), (8, 0), (7, 2)])
def test_rates_are_those_of_a_warm_up_before_torchs_cosine(epochs, warmup):
    plan = Recipe(epochs=epochs, warmup_epochs=warmup)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=plan.lr)
    scheduler, expected = CosineAnnealingLR(optimizer, epochs), [plan.warmup_lr] * warmup
    while len(expected) < epochs:  # the cosine has not moved while it warmed up
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert [plan.rate(epoch) for epoch in range(epochs)] == pytest.approx(expected, rel=1e-9, abs=1e-15)


def plain_contexts(kind, state, x):
    """CoOp's context, and CoCoOp's for one image, written down once more."""
    if kind == "coop":
        return state["ctx"]
    hidden = torch.relu(state["meta_net.linear1.weight"] @ x + state["meta_net.linear1.bias"])
    return state["ctx"] + state["meta_net.linear2.weight"] @ hidden + state["meta_net.linear2.bias"]


def plain_training(kind, model, state, plan, features, labels):
    """As the published code has it: every token of every prompt, autograd, SGD by hand."""
    ids = open_clip.SimpleTokenizer()([f"{WORDS} {name}." for name in NAMES])
    state = {name: value.detach().clone().requires_grad_() for name, value in state.items()}
    momentum = {name: torch.zeros_like(value) for name, value in state.items()}
    losses, grads = [], []

    def logits(x):
        with context_in_place(model.token_embedding, plain_contexts(kind, state, x)):
            return model.logit_scale.exp() * x @ normalize(model.encode_text(ids), dim=-1).T

    for epoch in range(plan.epochs):
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(plan.seed + epoch))
        whole = len(labels) // plan.batch_size * plan.batch_size
        total = 0.0
        for batch in order[:whole].split(plan.batch_size):
            found = torch.stack([logits(features[i, epoch % features.shape[1]]) for i in batch])
            loss = cross_entropy(found, labels[batch])
            slopes = torch.autograd.grad(loss, list(state.values()))
            grads.append(slopes[0])
            total += float(loss.detach()) * len(batch)
            with torch.no_grad():
                for (name, value), slope in zip(state.items(), slopes, strict=True):
                    momentum[name] = plan.momentum * momentum[name] + slope + plan.weight_decay * value
                    value -= plan.rate(epoch) * momentum[name]
        losses.append(total / whole)
    return state, losses, grads


@pytest.mark.parametrize("engine", ["packed", "module"])
@pytest.mark.parametrize(("kind", "batch_size"), [("coop", 4), ("cocoop", 1), ("cocoop", 3)])
def test_gradients_and_steps_are_those_of_plain_autograd(kind, batch_size, engine):
    model = models.clip(std=0.2).double()
    features, labels = examples(5, dtype=torch.float64)
    different = list(dict.fromkeys(NAMES))
    text = TextEncoder(model, different, WORDS, engine=engine)
    scale = model.logit_scale.detach().exp()
    classes = Classes.of(tuple(NAMES), text, scale, None)
    learner = train._Coop(text.ctx_init) if kind == "coop" else train._Cocoop(text.ctx_init, 32, seed=5)
    start = {name: value.clone() for name, value in learner.state_dict().items()}
    plan = Recipe(epochs=3, batch_size=batch_size, lr=0.02)
    ours = train._Run(classes, learner, plan, features, labels)
    grads = []
    learner.ctx.register_hook(lambda grad: grads.append(grad.clone()))
    ours.fit(None, {}, progress=False)
    state, losses, expected = plain_training(kind, model, start, plan, features, labels)

    assert len(grads) == len(expected) == 3 * (5 // batch_size)
    # One step after the other, each of which carries the roundings before it on: there and back through the tower.
    bound = 100 * len(grads) * bounds.rounding(2 * bounds.chain(model.transformer), torch.float64)
    assert bound < 1e-8
    for got, want in zip(grads, expected, strict=True):
        assert bounds.distance(got, want) < bound
    assert ours.losses == pytest.approx(losses, rel=bound)
    for name, value in learner.state_dict().items():
        assert bounds.distance(value, state[name]) < bound, name
        assert not torch.equal(value, start[name]), name


@pytest.mark.parametrize("trainer", [tpt_fast.train_coop, tpt_fast.train_cocoop])
def test_it_learns(clip, trainer):
    """Classes that can be told apart are, and the answer of a Tuner from there is the trained one."""
    features, labels = examples(40, views=2)
    trained = run(trainer, clip, data=(features, labels), epochs=8, batch_size=4, lr=0.02, n_ctx=4)
    assert trained.losses[-1] < trained.losses[0] / 2
    assert trained.accuracies[-1] > trained.accuracies[0] + 0.2
    tuner = Tuner(clip, NAMES, TuneConfig(ctx=trained.ctx, steps=0))
    answers = torch.stack([each.logits for each in tuner.tune_features(features)])
    dogs = torch.tensor([1, 4])  # either is right
    right = (answers.argmax(-1) == labels) | (torch.isin(labels, dogs) & torch.isin(answers.argmax(-1), dogs))
    assert right.float().mean() > trained.accuracies[0]


def test_the_demo_model_learns_its_photographs():
    loaded = demo.load()
    paths = [demo.PHOTO_FOLDER / file for file in demo.PHOTOS]
    labels = [loaded.classnames.index(name) for name in demo.PHOTOS.values()]
    trained = tpt_fast.train_coop(
        loaded.model, paths, labels, loaded.classnames, n_ctx=None, views=0, epochs=6, lr=0.02, progress=False
    )
    assert trained.losses[-1] < trained.losses[0]
    assert trained.accuracies[-1] > trained.accuracies[0]


def test_contexts_of_classes_and_places_of_the_name(clip):
    specific = run(tpt_fast.train_coop, clip, class_specific=True, n_ctx=4, ctx_init="X X [CLS] X X", epochs=2, lr=0.1)
    assert specific.ctx.shape == (5, 4, 64)
    assert not torch.equal(specific.ctx[1], specific.ctx[4])  # the dogs, each learned from its own images
    again = TextEncoder(clip.text, NAMES, "X X [CLS] X X", ctx=specific.ctx)
    assert again.encode(again.ctx_init).shape == (5, 32)
    words = run(tpt_fast.train_coop, clip, class_specific=True, n_ctx=None, epochs=1, warmup_lr=0.0)
    assert torch.equal(words.ctx, Tuner(clip, NAMES).classes.text.ctx_init.expand(5, 4, 64))


@pytest.mark.parametrize("trainer", [tpt_fast.train_coop, tpt_fast.train_cocoop])
def test_the_callers_modes_do_not_count(model, trainer):
    plain = run(trainer, model, epochs=2, n_ctx=4, lr=0.1)
    state = torch.random.get_rng_state()
    torch.set_default_dtype(torch.float64)
    torch.set_default_device("meta")
    try:
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
            with torch.device("cpu"):
                data = examples()
            other = run(trainer, model, data=data, epochs=2, n_ctx=4, lr=0.1)
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)
    assert other.losses == plain.losses
    assert all(map(torch.equal, tensors(plain), tensors(other)))
    assert torch.equal(torch.random.get_rng_state(), state)


# --- stopping, and going on


@pytest.mark.parametrize("trainer", [tpt_fast.train_coop, tpt_fast.train_cocoop])
@pytest.mark.parametrize("stop", [1, 3])
def test_going_on_is_as_not_having_stopped(clip, trainer, stop, tmp_path, monkeypatch):
    options = {"epochs": 4, "n_ctx": 4, "lr": 0.05, "batch_size": 3}
    whole = run(trainer, clip, **options)
    path, save = tmp_path / "model.pth.tar-4", train._Run.save

    def stopped(self, *arguments):
        save(self, *arguments)
        if len(self.losses) == stop:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(train._Run, "save", stopped)
        with pytest.raises(KeyboardInterrupt):
            run(trainer, clip, checkpoint=path, **options)
    assert torch.load(path, weights_only=True)["epoch"] == stop
    resumed = run(trainer, clip, checkpoint=path, resume=True, **options)
    assert resumed.losses == whole.losses
    assert resumed.accuracies == whole.accuracies
    for one, other in zip(tensors(whole), tensors(resumed), strict=True):
        assert torch.equal(one, other)
    assert run(trainer, clip, checkpoint=path, resume=True, **options).losses == whole.losses  # which is done
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def tensors(trained):
    return trained.ctx.tensors() if isinstance(trained.ctx, CoCoOp) else (trained.ctx,)


def test_a_checkpoint_of_another_training_is_refused(clip, tmp_path):
    path = tmp_path / "model.pth.tar-2"
    options = {"epochs": 2, "n_ctx": 4, "checkpoint": path}
    run(tpt_fast.train_coop, clip, **options)
    with pytest.raises(FileExistsError, match="resume=True goes on"):
        run(tpt_fast.train_coop, clip, **options)
    before = path.read_bytes()
    for other, what in (
        ({"lr": 0.1}, r"lr 0.002 there, 0.1 here$"),
        ({"epochs": 3}, "epochs 2 there, 3 here"),
        ({"data": examples(10)}, "labels "),
        ({"data": (examples()[0].roll(5, 0), examples()[1])}, "is of other images"),  # or in another order
    ):
        with pytest.raises(ValueError, match=what):
            run(tpt_fast.train_coop, clip, resume=True, **(options | other))
    with pytest.raises(ValueError, match=r"method 'coop' there, 'cocoop' here"):
        run(tpt_fast.train_cocoop, clip, resume=True, **options)
    assert path.read_bytes() == before
    path.write_bytes(b"nothing")
    with pytest.raises(ValueError, match="no training that can go on here"):
        run(tpt_fast.train_coop, clip, resume=True, **options)


# --- what is left behind


def test_coop_and_every_reader_of_its_checkpoints_reads_ours(clip, model, tmp_path):
    path = tmp_path / "model.pth.tar-2"
    trained = run(tpt_fast.train_coop, clip, n_ctx=4, epochs=2, checkpoint=path)
    content = torch.load(path, weights_only=True)
    assert set(content) - {"tpt_fast"} == {"state_dict", "epoch", "optimizer", "scheduler", "val_result"}

    class PromptLearner(nn.Module):  # as CoOp's: with embeddings of other classes beside the context
        def __init__(self):
            super().__init__()
            self.ctx = nn.Parameter(torch.zeros(4, 64))
            self.register_buffer("token_prefix", torch.ones(9, 1, 64))

    learner = PromptLearner()
    learner.load_state_dict(content["state_dict"], strict=False)
    assert torch.equal(learner.ctx, trained.ctx)
    assert content["epoch"] == 2
    assert torch.equal(tpt_fast.load_ctx(path), trained.ctx)
    Tuner(model, NAMES, TuneConfig(ctx=path))


def test_cocoop_is_read_back_whole(clip, tmp_path):
    path, kept = tmp_path / "model.pth.tar-1", tmp_path / "cocoop.safetensors"
    trained = run(tpt_fast.train_cocoop, clip, epochs=1, checkpoint=path)
    assert trained.ctx.normalised
    tpt_fast.save_ctx(trained.ctx, kept, clip)
    for file in (path, kept):
        again = tpt_fast.load_ctx(file)
        assert all(map(torch.equal, again.tensors(), trained.ctx.tensors()))
    features, _ = examples()
    tuner = Tuner(clip, NAMES, TuneConfig(ctx=path, steps=0))
    (result, *_) = tuner.tune_features(features)
    # The same context, through a tower that takes it for one image and for many: one more rounding of either.
    want = trained.ctx(features[:1, 0])[0]
    assert bounds.distance(result.ctx_init, want) < bounds.rounding(2 * 32)


# --- examples


def test_examples_are_bicubic_crops_as_torchvision_makes_them(clip):
    path = demo.PHOTO_FOLDER / "cat.jpg"
    found = encode_examples(clip, [path, path], views=3, seed=4, progress=False)
    assert found.shape == (2, 3, 32)
    assert not torch.equal(found[0], found[1])  # each image of a list has crops of its own
    assert torch.equal(found, encode_examples(clip, [path, path], views=3, seed=4, progress=False))
    pixels = load_image(path)
    image = picture.to_pil_image(pixels.permute(2, 0, 1))
    own = int(np.random.SeedSequence([4, 0]).generate_state(1, np.uint64)[0])
    wanted = clip.preprocessing
    views = []
    for top, left, height, width, flip in draw_boxes(*pixels.shape[:2], 3, seed=own).tolist():
        crop = picture.resized_crop(image, top, left, height, width, [32, 32], InterpolationMode.BICUBIC)
        crop = picture.hflip(crop) if flip else crop
        views.append(picture.normalize(picture.to_tensor(crop), wanted.mean, wanted.std))
    assert bounds.distance(found[0], clip.image.encode(torch.stack(views))) < bounds.rounding(
        bounds.chain(clip.model.visual)
    )


def test_plain_examples_and_many(clip):
    paths = [demo.PHOTO_FOLDER / file for file in demo.PHOTOS] * 9  # more than pass through the tower together
    plain = encode_examples(clip, paths, views=0, progress=False)
    assert plain.shape == (72, 1, 32)
    tuner = Tuner(clip, NAMES)
    one = tuner.encode(tuner.prepare(paths[70]))[0]
    assert bounds.distance(plain[70, 0], one) < 2 * bounds.rounding(bounds.chain(clip.model.visual))


def test_a_bar_shows_where_it_is(clip, capsys):
    features, labels = examples()
    tpt_fast.train_coop(clip, features, labels, NAMES, epochs=2, n_ctx=4)
    shown = capsys.readouterr().err
    assert "training" in shown
    assert "2/2" in shown
    assert "loss=" in shown
    run(tpt_fast.train_coop, clip, epochs=1, n_ctx=4)
    assert not capsys.readouterr().err


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"labels": [0] * 10}, ValueError, "labels: expected 11 integers, one an image"),
        ({"labels": [0.0] * 11}, ValueError, "labels: expected 11 integers"),
        ({"labels": [5] * 11}, ValueError, "labels: expected 0 to 4, got 5 to 5"),
        ({"labels": [-1] * 11}, ValueError, "labels: expected 0 to 4, got -1 to -1"),
        ({"images": torch.zeros(11, 32)}, ValueError, r"images: expected a list, or features \[N, V, 32\]"),
        ({"images": torch.full((11, 1, 32), math.nan)}, ValueError, "images: expected finite features"),
        ({"images": ["absent.jpg"] * 11}, FileNotFoundError, "absent"),
        ({"images": [torch.zeros(2)] * 11}, ValueError, r"images\[0\]: "),
        ({"classnames": []}, ValueError, "classnames: expected at least one name"),
        ({"epochs": 0}, ValueError, "epochs: expected 1 or more"),
        ({"momentum": 1.0}, ValueError, r"momentum: expected a number in \[0, 1\)"),
        ({"lr": -1}, ValueError, "lr: expected a number of 0 or more"),
        ({"momentun": 1}, TypeError, "momentun"),
        ({"lr": 3e38, "epochs": 3}, FloatingPointError, "the loss of epoch"),
    ],
)
def test_what_is_none(clip, changed, error, message):
    features, labels = examples()
    given = {"images": features, "labels": labels, "classnames": NAMES, "n_ctx": 4, "epochs": 1, "progress": False}
    with pytest.raises(error, match=message):
        tpt_fast.train_coop(clip, **(given | changed))
