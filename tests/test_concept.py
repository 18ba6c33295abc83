"""Concepts without a name: against plain PyTorch, and on concepts made for it."""

import bounds
import models
import numpy as np
import open_clip
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy, normalize

import tpt_fast
from tpt_fast import demo
from tpt_fast.clip import Clip
from tpt_fast.prompting import concept


@pytest.fixture(scope="module")
def clip():
    return Clip(models.clip(std=0.2))


def examples(seed, count, noise=0.8, width=32):
    """Positive and negative features [count, 1, D]: around two directions, which stay the same."""
    centres = torch.randn(2, 1, 1, width, generator=torch.Generator().manual_seed(9))
    random = torch.Generator().manual_seed(seed)
    return normalize(centres + noise * torch.randn(2, count, 1, width, generator=random), dim=-1)


def plain_fit(model, positives, negatives, ctx, names, place, steps, lr):
    """Both prompts of every token, autograd, and torch's AdamW."""
    words = [*["X"] * (len(ctx) + names.shape[1])]
    ids = open_clip.SimpleTokenizer()([" ".join(words) + "."] * 2)
    ctx, names = nn.Parameter(ctx.clone()), nn.Parameter(names.clone())
    optimizer = torch.optim.AdamW([ctx, names], lr=lr, weight_decay=0.01)
    losses, grads = [], []

    def put(_module, _inputs, embedded):
        own = [torch.cat([ctx[:place], name, ctx[place:]]) for name in names]
        return torch.cat([embedded[:, :1], torch.stack(own), embedded[:, 1 + len(words) :]], 1)

    handle = model.token_embedding.register_forward_hook(put)
    for _ in range(steps):
        text = normalize(model.encode_text(ids), dim=-1)
        logits = [model.logit_scale.exp() * each.flatten(0, 1) @ text.T for each in (positives, negatives)]
        loss = sum(
            cross_entropy(each, torch.full((len(each),), label)) / 2 for label, each in enumerate(logits)
        )  # each side by half
        optimizer.zero_grad()
        loss.backward()
        losses.append(loss.item())
        grads.append((ctx.grad.clone(), names.grad.clone()))
        optimizer.step()
    handle.remove()
    return losses, grads, ctx.detach(), names.detach()


@pytest.mark.parametrize(
    ("ctx_init", "n_name", "place", "counts"),
    [("a photo of a", 1, 4, (6, 6)), ("a photo of a", 2, 4, (6, 4)), ("the [CLS] of a", 1, 1, (3, 5))],
)
@pytest.mark.parametrize("engine", ["packed", "module"])
def test_steps_are_those_of_plain_autograd(engine, ctx_init, n_name, place, counts):
    model = models.clip(std=0.2)
    positives, negatives = (each[:count] for each, count in zip(examples(1, 6), counts, strict=True))
    start = concept._prompts(Clip(model), ctx_init, None, n_name, 3)
    clip = Clip(model, engine=engine)
    # By a rate of 1e-3, for AdamW's first steps go by the gradient's sign, which of tiny ones is rounding.
    fitted = tpt_fast.fit_concept(
        clip, positives, negatives, ctx_init=ctx_init, n_name=n_name, steps=3, lr=1e-3, seed=3
    )
    twin = models.clip(std=0.2).double()
    losses, grads, ctx, names = plain_fit(
        twin, positives.double(), negatives.double(), start[1].double(), start[2].double(), place, 3, 1e-3
    )
    bound = 3 * bounds.rounding(2 * bounds.chain(twin.transformer)) * float(twin.logit_scale.detach().exp())
    assert bound < 0.1
    assert fitted.losses == pytest.approx(losses, abs=bound)
    for got, want, slope in ((fitted.ctx, ctx, grads[0][0]), (fitted.names, names, grads[0][1])):
        sure = slope.abs() > 0.05 * slope.abs().max()
        assert sure.float().mean() > 0.5
        assert ((got - want).abs()[sure] < 1e-4).float().mean() > 0.95  # of 3e-3 that each entry has moved
        assert ((got - want).abs() < 6.1e-3).all()


def test_the_gradient_is_that_of_plain_autograd(clip):
    """The first step of plain descent, which AdamW hides: through both prompts at once."""
    model = clip.model
    prompts, ctx, names = concept._prompts(clip, "a photo of a", None, 2, 0)
    given = torch.cat([ctx.expand(2, -1, -1), names], 1)
    text, why = clip.text.bind(prompts, given, keep=True)
    assert text.name == "packed", why
    features, tape = text.forward(given, True)
    weights = torch.randn(features.shape)
    got = text.backward(tape, weights)
    twin = models.clip(std=0.2).double()
    ids = open_clip.SimpleTokenizer()(["X X X X X X."] * 2)
    leaf = given.double().requires_grad_()
    handle = twin.token_embedding.register_forward_hook(
        lambda _module, _inputs, embedded: torch.cat([embedded[:, :1], leaf, embedded[:, 7:]], 1)
    )
    plain = normalize(twin.encode_text(ids), dim=-1)
    handle.remove()
    (want,) = torch.autograd.grad(plain, leaf, weights.double())
    bound = bounds.rounding(2 * bounds.chain(model.transformer))
    assert bounds.distance(features, plain) < bound
    assert bounds.distance(got, want) < 4 * bound


@pytest.mark.parametrize("options", [{}, {"n_name": 3}, {"n_ctx": 8}, {"ctx_init": "[CLS] in a photo"}])
def test_a_made_concept_is_learned_and_found_in_others(clip, options):
    positives, negatives = examples(1, 6)
    fitted = tpt_fast.fit_concept(clip, positives, negatives, **options)
    assert fitted.losses[-1] < 0.1 * fitted.losses[0]
    shows, not_ = (fitted(each.flatten(0, 1)) for each in examples(2, 100))
    assert ((shows > 0.5).float().mean() + (not_ < 0.5).float().mean()) / 2 > 0.9
    again = tpt_fast.fit_concept(clip, positives, negatives, **options)
    assert torch.equal(fitted(positives[:, 0]), again(positives[:, 0]))


def test_the_callers_modes_do_not_count(clip):
    positives, negatives = examples(1, 3)
    plain = tpt_fast.fit_concept(clip, positives, negatives, steps=3)
    torch.set_default_dtype(torch.float64)
    torch.set_default_device("meta")
    try:
        with torch.inference_mode():
            other = tpt_fast.fit_concept(clip, positives, negatives, steps=3)
            answer = other(positives[:, 0])
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)
    assert other.losses == plain.losses
    assert torch.equal(answer, plain(positives[:, 0]))


def test_pictures_of_a_concept():
    """Warm and cold colours in noise, by the demo model."""
    random = np.random.default_rng(0)

    def pictures(tint, count):
        return [
            (random.integers(0, 120, (64, 64, 3)) + np.array(tint)).clip(0, 255).astype(np.uint8) for _ in range(count)
        ]

    warm, cold = (120, 60, 0), (0, 60, 120)
    model = demo.load().model
    fitted = tpt_fast.fit_concept(model, pictures(warm, 6), pictures(cold, 6), views=2, steps=24)
    assert (fitted(pictures(warm, 5)) > 0.5).all()
    assert (fitted(pictures(cold, 5)) < 0.5).all()


def test_what_is_none(clip):
    positives, negatives = examples(1, 3)
    for changed, error, message in (
        ({"n_name": 0}, ValueError, "n_name: expected 1 or more"),
        ({"steps": 0}, ValueError, "steps: expected 1 or more"),
        ({"lr": -1}, ValueError, "lr: expected a number of 0 or more"),
        ({"positives": positives[..., :5]}, ValueError, r"positives: expected a list, or features \[N, V, 32\]"),
        ({"negatives": []}, TypeError, "negatives: expected a list of images"),
        ({"negatives": [torch.zeros(2)]}, ValueError, r"negatives\[0\]: "),
        ({"negatives": ["absent.jpg"]}, OSError, "absent.jpg"),
        ({"negatives": negatives * torch.nan}, ValueError, "negatives: expected finite features"),
    ):
        with pytest.raises(error, match=message):
            tpt_fast.fit_concept(clip, **({"positives": positives, "negatives": negatives} | changed))
    fitted = tpt_fast.fit_concept(clip, positives, negatives, steps=1)
    with pytest.raises(ValueError, match="images: expected"):
        fitted(torch.zeros(3, 5))
