"""Tuner and tune on real photographs and open_clip models with seeded random weights."""

import copy
import io
import math
import subprocess
import sys
import threading
from dataclasses import dataclass
from types import SimpleNamespace

import bounds
import models
import numpy as np
import open_clip
import pytest
import torch
from PIL import Image

import tpt_fast
from tpt_fast import TextEncoder, TuneConfig, Tuner, tune
from tpt_fast._stages import Stages
from tpt_fast.demo import PHOTO_FOLDER
from tpt_fast.methods.tpt import Tpt
from tpt_fast.text.classes import Classes

NAMES = ["cat", "dog", "sports car", "goldfish"]
FEW = {"n_views": 8, "rho": 0.25}


def small_model(kind="CLIP", **vision):
    return models.clip(kind, std=0.15, vision=vision)


@pytest.fixture(scope="module")
def model():
    return small_model()


@pytest.fixture(scope="module")
def image():
    return PHOTO_FOLDER / "cat.jpg"


@pytest.fixture(scope="module")
def tuner(model):
    return Tuner(model, NAMES, TuneConfig(**FEW))


def same(a, b):
    return all(torch.equal(getattr(a, name), getattr(b, name)) for name in ("logits", "ctx", "entropies", "selected"))


def test_result_is_complete_and_consistent(tuner, image):
    result = tuner(image)
    assert result.status == "tuned"
    assert result.logits.shape == result.zero_shot_logits.shape == (4,)
    assert result.ctx.shape == result.ctx_init.shape == (4, 64)
    assert result.entropies.shape == (8,)
    assert result.selected.tolist() == result.entropies.argsort(stable=True)[:2].tolist()
    assert result.label == NAMES[result.index] == result.topk(2)[0].label
    assert result.index == int(result.logits.argmax())
    bounds.assert_within(result.probs.sum(), torch.tensor(1.0), bounds.rounding(2 * len(NAMES)))
    assert not torch.equal(result.ctx, result.ctx_init)
    assert result.loss_after < result.loss
    assert result.timings["total"] >= result.timings["encode"] > 0
    assert result.engines["ops"] == "native"
    assert repr(result).startswith(f"TuneResult({result.label!r}: ")


def test_one_step_is_what_autograd_and_torch_optim_give(model, image):
    config = TuneConfig(**FEW, steps=2)
    result = Tuner(model, NAMES, config)(image, keep_views=True)
    clip = small_model().eval()
    ctx = torch.nn.Parameter(result.ctx_init.clone())
    optimiser = torch.optim.AdamW([ctx], lr=config.lr)
    images = torch.nn.functional.normalize(clip.encode_image(result.views), dim=-1).detach()
    scale = clip.logit_scale.exp().detach()

    def logits():
        ids = open_clip.tokenizer.SimpleTokenizer()([f"a photo of a {name}." for name in NAMES])
        x = clip.token_embedding(ids)
        x = torch.cat([x[:, :1], ctx.expand(len(ids), -1, -1), x[:, 5:]], 1) + clip.positional_embedding
        x = clip.ln_final(clip.transformer(x, attn_mask=clip.attn_mask))
        x = x[torch.arange(len(ids)), ids.argmax(1)] @ clip.text_projection
        return scale * images @ torch.nn.functional.normalize(x, dim=-1).T

    before, losses = logits().detach(), []
    entropies = torch.distributions.Categorical(logits=before).entropy()
    for _ in range(2):
        mean = logits()[result.selected].log_softmax(1).logsumexp(0) - math.log(2)
        losses.append(-(mean.exp() * mean).sum())
        optimiser.zero_grad()
        losses[-1].backward()
        optimiser.step()
    answer = {"zero_shot_logits": before[0], "logits": logits()[0].detach(), "entropies": entropies, "grad": ctx.grad}
    answer |= {"selected": entropies.argsort()[:2], "loss": losses[0].item(), "ctx_init": result.ctx_init}
    allowed = bounds.answers(clip, result.views, NAMES, rho=FEW["rho"], steps=2)
    bounds.assert_same_answer(result, SimpleNamespace(**answer, ctx=ctx.detach()), allowed, steps=2)


def test_the_answer_does_not_depend_on_the_call(model, tuner, image):
    first = tuner(image)
    assert same(first, tuner(image))
    assert same(first, Tuner(model, NAMES, TuneConfig(**FEW))(image))
    assert not torch.equal(first.entropies, Tuner(model, NAMES, TuneConfig(**FEW, seed=1))(image).entropies)


def test_an_image_in_any_form(tuner, image):
    first = tuner(image)
    pil = Image.open(image).convert("RGB")
    array = np.array(pil)
    for form in (str(image), pil, array, torch.from_numpy(array), torch.from_numpy(array).permute(2, 0, 1)):
        assert same(first, tuner(form))


def test_given_views_equal_drawn_ones(tuner, image):
    first = tuner(image, keep_views=True)
    assert same(first, tuner.tune_views(first.views))
    assert tuner(image).views is None


def test_strict_official_draws_from_torchs_generator(model, image):
    tuner = Tuner(model, NAMES, TuneConfig(n_views=11, strict_official=True))
    torch.manual_seed(7)
    first, second = tuner(image), tuner(image)
    torch.manual_seed(7)
    assert same(first, tuner(image))
    assert not torch.equal(first.entropies, second.entropies)


def test_the_model_is_left_alone(image):
    model = small_model(patch_dropout=0.5).train()
    before = {name: (p.clone(), p.requires_grad, p.dtype) for name, p in model.named_parameters()}
    modes = [m.training for m in model.modules()]
    tuner = Tuner(model, NAMES, TuneConfig(**FEW, precision="bf16"))
    assert same(tuner(image), tuner(image))
    assert [m.training for m in model.modules()] == modes
    for name, p in model.named_parameters():
        value, requires_grad, dtype = before[name]
        assert torch.equal(p, value)
        assert (p.requires_grad, p.dtype, p.grad) == (requires_grad, dtype, None)


@pytest.mark.parametrize("kind", ["CLIP", "CustomTextCLIP"])
def test_both_kinds_of_model(kind, image):
    assert tune(small_model(kind), image, NAMES, **FEW).status == "tuned"


def test_a_resnet_model(image):
    model = small_model(layers=(1, 1, 1, 1), width=16, patch_size=None)
    assert tune(model, image, NAMES, **FEW).status == "tuned"


def test_threads_share_a_tuner(tuner, image):
    first, found = tuner(image), []
    threads = [threading.Thread(target=lambda: found.extend(tuner(image) for _ in range(3))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 9
    assert all(same(first, result) for result in found)


def test_set_classnames(model, image):
    tuner = Tuner(model, ["one", "two"], TuneConfig(**FEW))
    tuner.set_classnames(NAMES)
    assert tuner.classnames == tuple(NAMES)
    assert same(tuner(image), Tuner(model, NAMES, TuneConfig(**FEW))(image))


def test_tune_keeps_its_tuners_and_notices_changed_weights(image, monkeypatch):
    model, made = small_model(), []
    init = Tuner.__init__
    monkeypatch.setattr(Tuner, "__init__", lambda self, *a, **k: (made.append(1), init(self, *a, **k))[1])
    first = tune(model, image, NAMES, **FEW)
    assert same(first, tune(model, image, NAMES, **FEW))
    assert len(made) == 1
    with torch.no_grad():
        model.positional_embedding.mul_(-1)
    assert not torch.equal(first.logits, tune(model, image, NAMES, **FEW).logits)
    tune(model, image, NAMES[:2], **FEW)
    assert len(made) == 3
    kept = [key for key in tpt_fast.cache._tuners if key[0][0] == id(model)]
    assert len(kept) == 2  # not the one of the old weights
    for factor in (0.5, -1):  # tensors whose versions are all equal
        before = tune(model, image, NAMES, **FEW)
        weights = {name: (w * factor).detach() for name, w in model.state_dict().items()}
        model.load_state_dict(weights, assign=True)
        assert not torch.equal(before.logits, tune(model, image, NAMES, **FEW).logits)
    made.clear()

    class Mine:
        def objective(self, logits):
            return logits.logsumexp(-1).mean()

    mine = Mine()
    for _ in range(2):
        tune(model, image, NAMES, **FEW, objective=mine.objective)
    assert len(made) == 1
    tune.cache_clear()
    tune(model, image, NAMES, **FEW)
    assert len(made) == 2


def test_duplicate_names_get_equal_logits_and_the_first_wins(model, image):
    result = tune(model, image, ["goldfish", "goldfish"], **FEW)
    assert result.logits[0] == result.logits[1]
    assert result.index == 0
    assert [p.index for p in result.topk(2)] == [0, 1]


def test_no_steps_is_zero_shot(model, image):
    result = tune(model, image, NAMES, **FEW, steps=0)
    assert torch.equal(result.logits, result.zero_shot_logits)
    assert result.loss == result.loss_after


def test_a_gradient_that_is_not_finite_is_skipped(model, image):
    result = tune(model, image, NAMES, **FEW, objective=lambda logits: (logits * math.inf).sum())
    assert result.status == "skipped"
    assert torch.equal(result.logits, result.zero_shot_logits)
    assert torch.equal(result.ctx, result.ctx_init)


def test_tune_notices_other_layers_and_another_checkpoint(image, tmp_path):
    model, path = small_model(), tmp_path / "ctx.pt"
    first = tune(model, image, NAMES, **FEW)
    model.visual.transformer.resblocks[0].mlp.gelu = open_clip.transformer.QuickGELU()
    assert not torch.equal(tune(model, image, NAMES, **FEW).entropies, first.entropies)
    for ctx in torch.randn(2, 3, 64):
        torch.save({"state_dict": {"ctx": ctx}}, path)
        assert torch.equal(tune(model, image, NAMES, **FEW, ctx=path).ctx_init, ctx)


def test_an_objective_and_a_tokenizer_that_cannot_be_hashed(model, image):
    @dataclass
    class Objective:
        weight: float

        def __call__(self, logits):
            return self.weight * logits.softmax(-1).square().sum()

    mine = Objective(1.0)
    want = Tuner(model, NAMES, TuneConfig(**FEW), objective=mine)(image)
    assert same(tune(model, image, NAMES, **FEW, objective=mine), want)
    assert not torch.equal(tune(model, image, NAMES, **FEW, objective=Objective(-1.0)).ctx, want.ctx)


def test_nothing_is_shared_with_the_caller(model, image):
    """Neither what was given, nor what came back."""
    ctx, views = torch.randn(4, 64), torch.randn(8, 3, 32, 32, requires_grad=True)
    tuner = Tuner(model, NAMES, TuneConfig(**FEW, ctx=ctx))
    first, viewed = tuner(image), tuner.tune_views(views, keep_views=True)
    ctx.zero_()
    next(tuner.map(["nowhere.png"])).ctx_init.zero_()
    viewed.views.zero_()
    first.ctx_init.zero_()
    assert same(tuner(image), first)
    assert views.detach().abs().sum() > 0

    def writes(logits):
        loss = logits.clone().softmax(-1).square().sum()
        with torch.no_grad():
            logits.zero_()
        return loss

    def reads(logits):
        return logits.softmax(-1).square().sum()

    assert same(*(Tuner(model, NAMES, TuneConfig(**FEW), objective=each)(image) for each in (writes, reads)))


def test_results_are_told_apart_by_identity(tuner, image):
    first, second = tuner(image), tuner(image)
    assert first != second
    assert first in {first, second}
    assert len({first, second}) == 2


@pytest.mark.parametrize("engine", ["packed", "module"])
def test_an_answer_that_is_not_finite_is_the_zero_shot_one(model, image, engine):
    result = tune(model, image, NAMES, **FEW, lr=1e38, engine=engine)
    assert result.status == "skipped"
    assert torch.equal(result.logits, result.zero_shot_logits)
    assert torch.equal(result.ctx, result.ctx_init)


@pytest.mark.parametrize("engine", ["packed", "module"])
def test_half_precision_takes_the_step_of_confident_predictions(image, engine):
    model = small_model().eval()
    model.logit_scale.data.fill_(7.0)
    exact, half = (Tuner(model, NAMES, TuneConfig(**FEW, engine=engine, precision=p))(image) for p in ("fp32", "fp16"))
    assert exact.grad.abs().max() < 6e-8  # the least that float16 can tell from zero
    # So confident a prediction's gradient grows with the exponential of its logits' rounding; its direction does not.
    one, two = (result.grad.double() / result.grad.double().norm() for result in (half, exact))
    assert (one - two).norm() < bounds.halved(model.transformer, torch.float16)


@pytest.mark.parametrize(
    "options", [{}, {"engine": "module"}, {"objective": lambda logits: logits.logsumexp(-1).sum()}]
)
def test_inference_mode_changes_nothing(model, image, options):
    want = tune(model, image, NAMES, **FEW, **options)
    tune.cache_clear()
    with torch.inference_mode():
        assert same(tune(model, image, NAMES, **FEW, **options), want)
    assert same(tune(model, image, NAMES, **FEW, **options), want)


@pytest.mark.parametrize("options", [{}, {"engine": "module"}, {"ctx": torch.full((2, 64), 0.02)}])
def test_a_model_made_in_inference_mode(image, options):
    want = tune(small_model(), image, NAMES, **FEW, **options)
    with torch.inference_mode():
        model = small_model()
        options = {name: o.clone() if isinstance(o, torch.Tensor) else o for name, o in options.items()}
    assert model.positional_embedding.is_inference()
    assert same(tune(model, image, NAMES, **FEW, **options), want)


@pytest.mark.parametrize("options", [{}, {"strict_official": True, "precision": "fp16"}])
def test_logits_hold_the_bias_of_a_sigmoid_model(image, options):
    model = small_model().eval()
    model.logit_bias = torch.nn.Parameter(torch.tensor([-10.0]))
    result = tune(model, image, NAMES, **FEW, **options, keep_views=True)
    ids = open_clip.tokenizer.SimpleTokenizer()([f"a photo of a {name}." for name in NAMES])
    with torch.no_grad():
        own = model.get_logits(result.views[:1], ids)[0][0]
    difference = bounds.logits(model, torch.float32, torch.float16 if options else torch.float32)
    bounds.assert_within(result.zero_shot_logits, own, difference)
    assert not torch.equal(result.logits, result.zero_shot_logits)


def test_another_objective(model, image):
    def marginal_entropy(logits):
        entropy = torch.distributions.Categorical(logits=logits).entropy()
        mean = logits[entropy.argsort(stable=True)[:2]].softmax(-1).mean(0)
        return -(mean * mean.log()).sum()

    ours = tune(model, image, NAMES, **FEW, keep_views=True)
    theirs = tune(model, image, NAMES, **FEW, objective=marginal_entropy)
    allowed = bounds.answers(model, ours.views, NAMES, rho=FEW["rho"])
    bounds.assert_same_answer(ours, theirs, allowed)


def test_plot(tuner, image, tmp_path):
    figure = tuner(image, keep_views=True).plot(tmp_path / "views.png")
    assert len(figure.axes) >= 9
    assert Image.open(tmp_path / "views.png").width > 500
    assert [p.name for p in tmp_path.iterdir()] == ["views.png"]
    tuner(image, keep_views=True).plot(tmp_path / "no ending")
    assert Image.open(tmp_path / "no ending.png").width > 500
    with pytest.raises(ValueError, match="pgn"):
        tuner(image, keep_views=True).plot(tmp_path / "views.pgn")
    with pytest.raises(ValueError, match="holds no views"):
        tuner(image).plot()


def test_a_notebook_shows_a_plot(tuner, image):
    """Without pyplot, whose import is what makes it show other figures."""
    result = tuner(image, keep_views=True)
    for shown in (result, result.plot()):
        drawn = Image.open(io.BytesIO(shown._repr_png_()))
        assert drawn.format == "PNG"
        assert drawn.width > 500
    assert tuner(image)._repr_png_() is None


@pytest.mark.parametrize(
    ("views", "error", "message"),
    [
        (
            torch.zeros(4, 3, 32, 32, dtype=torch.uint8),
            TypeError,
            "views: expected a floating point tensor .* torch.uint8",
        ),
        ([1.0], TypeError, "views: expected a floating point tensor .* got list"),
        (torch.zeros(4, 1, 32, 32), ValueError, r"views: expected \[N, 3, 32, 32\], got \[4, 1, 32, 32\]"),
        (torch.zeros(1, 3, 32, 32), ValueError, "views: expected 2 or more views, got 1"),
        (torch.full((4, 3, 32, 32), math.nan), ValueError, "views: expected finite values, got NaN or infinity"),
    ],
)
def test_messages_for_views(tuner, views, error, message):
    with pytest.raises(error, match=message):
        tuner.tune_views(views)


def test_an_objective_of_more_than_the_logits_is_refused(model, image):
    """Its other terms would be lost without a word."""
    text = torch.nn.Parameter(torch.randn(3, 4))
    message = r"objective: .* also depends on 1 other tensors with a gradient \(\[3, 4\]\): their part would be lost"
    with pytest.raises(ValueError, match=message):
        tune(model, image, NAMES, **FEW, objective=lambda logits: logits.logsumexp(-1).mean() + text.square().sum())
    detached = tune(
        model, image, NAMES, **FEW, objective=lambda logits: logits.logsumexp(-1).mean() + text.detach().square().sum()
    )
    assert detached.status == "tuned"


def test_a_step_that_is_rounding_says_so(model):
    """Views that are as sure as float32 can be, of different classes: their gradient is what cancelling leaves. The
    signs that are not float64's are among the entries that the result doubts."""
    names = tuple(f"{kind} {name}" for kind in ("red", "big", "old", "sea") for name in ("cat", "dog", "car", "lion"))
    encoder, exact = TextEncoder(model, names), TextEncoder(copy.deepcopy(model).double(), names)
    noise = torch.randn(40, 60, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    images, doubted = torch.nn.functional.normalize(noise, dim=-1), {}
    for scale in (25.0, 400.0):
        found = Tpt()(images.float(), Classes(names, encoder, torch.tensor(scale)), Stages()).extra
        truth = Tpt()(images, Classes(names, exact, torch.tensor(scale).double()), Stages()).extra
        wrong = (found["grad"].sign() != truth["grad"].sign()).float().flatten(1).mean(1)
        same_views = (found["selected"] == truth["selected"]).all(1)
        assert (wrong <= found["doubtful"] + 0.02)[same_views].all()
        doubted[scale] = found["doubtful"].max().item()
    assert doubted[25.0] < 0.01
    assert doubted[400.0] > 0.3


def test_messages(model, image):
    with pytest.raises(TypeError, match="model: expected a CLIP of open_clip or transformers, got str"):
        tune("ViT-B-16", image, NAMES)
    with pytest.raises(TypeError, match="model: expected an open_clip model with an image tower, got Linear"):
        Tuner(torch.nn.Linear(2, 2), NAMES)
    with pytest.raises(TypeError, match="config: expected a TuneConfig, got dict"):
        Tuner(model, NAMES, {"rho": 0.1})
    with pytest.raises(TypeError, match=r"objective: expected a function of the logits, .*, got float"):
        Tuner(model, NAMES, objective=1.0)
    with pytest.raises(ValueError, match=r"objective: expected .* a scalar tensor, got torch.float32 \[8, 4\]"):
        tune(model, image, NAMES, **FEW, objective=lambda logits: logits)
    with pytest.raises(ValueError, match="objective: expected it to return a scalar tensor, got float"):
        tune(model, image, NAMES, **FEW, objective=lambda logits: 1.0)
    with pytest.raises(ValueError, match="objective: expected it to depend on the logits"):
        tune(model, image, NAMES, **FEW, objective=lambda logits: logits.detach().sum())
    with pytest.raises(ValueError, match="objective: expected it to depend on the logits"):
        tune(model, image, NAMES, **FEW, objective=lambda logits: torch.ones((), requires_grad=True) * 2)
    with pytest.raises(ValueError, match=r"objective: expected .* a scalar tensor, got torch.complex64"):
        tune(model, image, NAMES, **FEW, objective=lambda logits: logits.sum() * 1j)
    for names, got in (("cat", "str"), (None, "NoneType")):
        with pytest.raises(TypeError, match=f"classnames: expected a sequence of strings, got {got}"):
            tune(model, image, names)
    with pytest.raises(ValueError, match="boxes: expected one or more crops, got none"):
        Tuner(model, NAMES)(image, boxes=torch.empty(0, 5, dtype=torch.int32))
    with pytest.raises(ValueError, match="model: expected it on the CPU or on CUDA, got it on meta"):
        Tuner(small_model().to("meta"), NAMES)
    with pytest.raises(ValueError, match="k: expected 1 or more, got 0"):
        tune(model, image, NAMES, **FEW).topk(0)
    headless = small_model("CustomTextCLIP")
    del headless.text
    with pytest.raises(TypeError, match=r"model: expected .* with a text tower"):
        Tuner(headless, NAMES)


def test_public_names():
    assert sorted(tpt_fast.__all__) == tpt_fast.__all__
    assert all(hasattr(tpt_fast, name) for name in tpt_fast.__all__)
    code = (
        "import tpt_fast; assert 'torch' not in __import__('sys').modules; tpt_fast.demo.load, tpt_fast.ops.objective"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_class_specific_contexts(model, image):
    ctx = 0.1 * torch.randn(len(NAMES), 3, 64)
    result = tune(model, image, NAMES, **FEW, ctx=ctx)
    assert result.ctx.shape == ctx.shape
    with pytest.raises(ValueError, match="expected one context for each of 3 classes"):
        tune(model, image, NAMES[:3], **FEW, ctx=ctx)


def test_a_coop_checkpoint(model, image, tmp_path):
    ctx = 0.1 * torch.randn(4, 64)
    torch.save({"state_dict": {"ctx": ctx, "token_prefix": torch.zeros(1)}}, tmp_path / "coop.pth")
    assert same(tune(model, image, NAMES, **FEW, ctx=tmp_path / "coop.pth"), tune(model, image, NAMES, **FEW, ctx=ctx))
