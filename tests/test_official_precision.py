"""``strict_official`` with fp16: the published loop's autocast and GradScaler, written plainly here once more."""

import math

import bounds
import models
import open_clip
import pytest
import torch
from torch import nn

from tpt_fast import TuneConfig, Tuner
from tpt_fast.methods.published import context_in_place, marginal_entropy, tpt, view_entropies

pytestmark = pytest.mark.numerics

NAMES = ["cat", "dog", "great white shark", "sports car", "goldfish"]
OPTIONS = {"n_views": 8, "rho": 0.5, "strict_official": True, "precision": "fp16"}


@pytest.fixture(scope="module")
def model():
    model = models.clip(std=0.15).requires_grad_(False)
    model.logit_scale.fill_(math.log(100))
    return model


def published(model, images, scaler, steps):
    """(logits, ctx, selected, zero-shot logits, whether a step was taken) of each image's views, in turn."""
    tokenizer, table = open_clip.get_tokenizer("ViT-B-32"), model.token_embedding
    ids = tokenizer([f"a photo of a {name}." for name in NAMES])
    start = table.weight[ids[0, 1:5]].clone()

    def logits_of(features, ctx):
        with context_in_place(table, ctx):
            text = model.encode_text(ids)
        text = text / text.norm(dim=-1, keepdim=True)
        return model.logit_scale.exp() * features @ text.t()

    for views in images:
        ctx, taken = nn.Parameter(start.clone()), False
        optimizer = torch.optim.AdamW([ctx], lr=5e-3)
        for step in range(steps):
            with torch.autocast("cpu", torch.float16):
                with torch.no_grad():
                    features = model.encode_image(views)
                    features = features / features.norm(dim=-1, keepdim=True)
                logits = logits_of(features, ctx)
                assert logits.dtype == torch.float16
                if step == 0:
                    before = logits.detach()[0]
                    selected = view_entropies(logits.detach().float()).argsort(stable=True)[:4]
                loss = marginal_entropy(logits[selected].float())
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            taken |= bool(ctx.grad.isfinite().all())
            scaler.update()
        with torch.no_grad(), torch.autocast("cpu", torch.float16):
            after = logits_of(features, ctx)[0]
        yield after.float(), ctx.detach(), selected, before.float(), taken


@pytest.fixture(scope="module")
def allowed(model):
    """Of logits in fp16, before and after a step."""

    def answer(model):
        found = [tpt(model, views, NAMES, open_clip.get_tokenizer("ViT-B-32"), rho=0.5) for views in draw(3)]
        return {name: torch.stack([getattr(one, name) for one in found]) for name in ("logits", "zero_shot_logits")}

    def draw(count):
        return [torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(i)).double() for i in range(count)]

    return max(bounds.moved(model, answer, torch.float16).values())


# The second scale overflows fp16 in the first images, and has come down for the last ones.
@pytest.mark.parametrize(("scale", "skipped"), [(1000.0, False), (2.0**34, True)])
@pytest.mark.parametrize("steps", [1, 2])
def test_equals_the_published_loop_image_after_image(model, steps, scale, skipped, allowed, monkeypatch):
    monkeypatch.setattr("tpt_fast.methods.official.INITIAL_SCALE", scale)
    images = [torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(i)) for i in range(8)]
    tuner = Tuner(model, NAMES, TuneConfig(steps=steps, **OPTIONS))
    results = [tuner.tune_views(views) for views in images]
    scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    for result, want in zip(results, published(model, images, scaler, steps), strict=True):
        logits, ctx, selected, before, taken = want
        assert result.status == ("tuned" if taken else "skipped")
        assert result.selected.tolist() == selected.tolist()
        for got, want in ((result.logits, logits), (result.zero_shot_logits, before)):
            # Both in fp16, and for prompts of other lengths in another order of sums.
            assert (got - want).abs().max() < 2 * allowed
        # AdamW goes by the sign, which is rounding where the gradient is below some 5 % of its largest: of numbers from
        # a normal distribution, whose largest of 256 are three standard deviations, 12 % are.
        assert ((result.ctx - ctx).abs() > 1e-3).float().mean() < 0.2
    assert tuner.method.scaler.get_scale() == scaler.get_scale()
    if skipped:
        assert scaler.get_scale() < scale
        assert {result.status for result in results} == {"skipped", "tuned"}
        for result in results:
            if result.status == "skipped":
                assert torch.equal(result.logits, result.zero_shot_logits)
    else:
        assert {result.status for result in results} == {"tuned"}
        assert scaler.get_scale() == scale
    ran = {name: results[0].engines[name] for name in ("loop", "text", "image")}
    assert ran == {"loop": "published", "text": "module", "image": "module"}


def test_logits_are_fp16_and_close_to_float32(model, allowed):
    views = torch.randn(8, 3, 32, 32)
    half = Tuner(model, NAMES, TuneConfig(**OPTIONS)).tune_views(views)
    full = Tuner(model, NAMES, TuneConfig(**OPTIONS | {"precision": "fp32"})).tune_views(views)
    assert torch.equal(half.zero_shot_logits, half.zero_shot_logits.half().float())
    assert 0 < (half.zero_shot_logits - full.zero_shot_logits).abs().max() < allowed
    assert full.engines["loop"] == "eager"


def test_no_steps_and_batches(model):
    views = torch.randn(8, 3, 32, 32)
    zero_shot = Tuner(model, NAMES, TuneConfig(steps=0, **OPTIONS)).tune_views(views)
    assert torch.equal(zero_shot.logits, zero_shot.zero_shot_logits)
    assert zero_shot.status == "tuned"
    image = (255 * torch.rand(40, 50, 3)).byte()
    torch.manual_seed(0)
    one, two = Tuner(model, NAMES, TuneConfig(**OPTIONS)).tune_batch([image, image])
    torch.manual_seed(0)
    tuner = Tuner(model, NAMES, TuneConfig(**OPTIONS))
    for got in (one, two):
        want = tuner(image)
        assert torch.equal(got.logits, want.logits)
        assert torch.equal(got.ctx, want.ctx)


def test_what_does_not_go_together(model):
    with pytest.raises(ValueError, match="engine: expected 'auto' or 'module' with strict_official and fp16"):
        TuneConfig(engine="packed", **OPTIONS)
    with pytest.raises(ValueError, match="objective: expected None with strict_official and fp16"):
        Tuner(model, NAMES, TuneConfig(**OPTIONS), objective=lambda logits: logits.sum())
