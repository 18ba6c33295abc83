"""CoCoOp: contexts that depend on the image, with every method on top of them."""

import re

import numpy as np
import pytest
import torch
from method_cases import NAMES, small_clip
from test_official import model  # noqa: F401 (a fixture)
from test_official_methods import assert_close, assert_tuned, case, family, folder, views  # noqa: F401 (some fixtures)
from torch.nn.functional import normalize

import tpt_fast
from tpt_fast import TuneConfig, Tuner
from tpt_fast.clip import Clip
from tpt_fast.methods import Tpt
from tpt_fast.prompting import CoCoOp, load_ctx
from tpt_fast.prompting.cocoop import load_start

WIDE = 8


def meta_net(clip, *, normalised=True, scale=0.3, n_ctx=4):
    """A random CoCoOp for ``clip``; a shift that matters."""
    width, features = clip.text.width, clip.encode(torch.zeros(1, 1, 3, *[clip.preprocessing.size] * 2)).shape[-1]
    random = torch.Generator().manual_seed(3)

    def draw(*shape, by=scale):
        return torch.randn(*shape, generator=random) * by

    ctx, second = draw(n_ctx, width, by=0.05), draw(width, WIDE, by=0.05)
    return CoCoOp(ctx, draw(WIDE, features), draw(WIDE, by=0.1), second, draw(width, by=0.01), normalised)


def saved(cocoop, path, **more):
    """As CoCoOp's trainer leaves it."""
    names = (
        "ctx",
        "meta_net.linear1.weight",
        "meta_net.linear1.bias",
        "meta_net.linear2.weight",
        "meta_net.linear2.bias",
    )
    state = dict(zip(names, cocoop.tensors(), strict=True)) | {"token_prefix": torch.zeros(3, 1, 2)} | more
    torch.save({"state_dict": state, "epoch": 10, "optimizer": None, "val_result": np.float64(0.5)}, path)
    return path


@pytest.fixture(scope="module")
def clip():
    return Clip(small_clip())


@pytest.fixture(scope="module")
def images(clip):
    """Normalised views [3, 8, 3, S, S]."""
    size = clip.preprocessing.size
    return torch.randn(3, 8, 3, size, size, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("method", ["tpt", "ctpt", "rtpt", "tps", "zero", "mta", "zero_shot", "ensemble"])
@pytest.mark.parametrize("normalised", [True, False])
def test_every_method_equals_one_that_starts_from_the_images_own_context(clip, images, method, normalised):
    cocoop, options = meta_net(clip, normalised=normalised), {"n_views": 8, "rho": 0.4, "method": method}
    options = options if method in ("tpt", "ctpt", "tps") else {"n_views": 8, "method": method}
    options |= {"neighbours": 3} if method == "rtpt" else {}
    tuner = Tuner(clip, NAMES, TuneConfig.of(ctx=cocoop, **options))
    for views_of in images:
        with torch.no_grad():
            feature = clip.encode(views_of[None], normalise=normalised)[0, :1]
            ctx = cocoop(feature)[0]
        got, want = (
            tuner.tune_views(views_of),
            Tuner(clip, NAMES, TuneConfig.of(ctx=ctx, **options)).tune_views(views_of),
        )
        torch.testing.assert_close(got.ctx_init, ctx)
        torch.testing.assert_close(got.zero_shot_logits, want.zero_shot_logits, rtol=0, atol=1e-4)
        torch.testing.assert_close(got.logits, want.logits, rtol=0, atol=1e-3)
        assert got.engines["start"] == "CoCoOp" + ("" if normalised else ", features as they are")
    fixed = Tuner(clip, NAMES, TuneConfig.of(ctx=cocoop.ctx, **options)).tune_views(images[0])
    if method != "ensemble":
        assert (fixed.logits - tuner.tune_views(images[0]).logits).abs().max() > 1e-2


def test_against_autograd_through_the_models_own_tower(clip, images):
    """The context is detached and tuned by itself, the net stays: one AdamW step by torch on the plain loss."""
    cocoop = meta_net(clip)
    tuner = Tuner(clip, NAMES, TuneConfig(ctx=cocoop, n_views=8, rho=0.4))
    got = tuner.tune_views(images[1])
    encoder = tpt_fast.TextEncoder(clip.model, NAMES, ctx=cocoop.ctx, engine="module")
    features = normalize(clip.encode(images[1][None])[0], dim=-1)
    ctx = torch.nn.Parameter(cocoop(features[:1])[0].detach())
    optimizer = torch.optim.AdamW([ctx], lr=5e-3)
    logits = clip.scale * features @ encoder.encode(ctx).T
    entropy = -(logits.softmax(-1) * logits.log_softmax(-1)).sum(-1)
    kept = logits[entropy.argsort()[:3]].log_softmax(-1)
    mean = kept.logsumexp(0) - np.log(3)
    (-(mean.exp() * mean).sum()).backward()
    assert_close("grad", got.grad, ctx.grad.numpy())
    optimizer.step()
    with torch.no_grad():
        after = clip.scale * features[0] @ encoder.encode(ctx).T
    clear = ctx.grad.abs() > 1e-4 * ctx.grad.abs().max()
    assert (got.ctx - ctx.detach()).abs()[clear].max() < 1e-5
    assert (got.logits - after).abs().max() < 1e-2


def test_a_batch_several_methods_and_kept_features(clip, images):
    tuner = Tuner(clip, NAMES, TuneConfig(ctx=meta_net(clip), n_views=8, method=[Tpt(rho=0.4, steps=2), "zero"]))
    single = [tuner.tune_views(each) for each in images]
    with torch.no_grad():
        together = tuner.tune_features(clip.encode(images))
    for one, other in zip(single, together, strict=True):
        torch.testing.assert_close(one.ctx_init, other.ctx_init)
        torch.testing.assert_close(one.logits, other.logits, rtol=0, atol=1e-3)
        assert torch.equal(one.by_method["zero"].ctx_init, one.ctx_init)
        assert one.by_method["zero"].selected.tolist() == other.by_method["zero"].selected.tolist()
    assert not torch.equal(single[0].ctx_init, single[1].ctx_init)
    raw = Tuner(clip, NAMES, TuneConfig(ctx=meta_net(clip, normalised=False), n_views=8))
    with pytest.raises(ValueError, match="features: expected views in their place, for this CoCoOp's net"):
        raw.tune_features(torch.randn(8, 32))


def test_a_checkpoint_is_told_by_what_it_holds(clip, images, tmp_path):
    cocoop = meta_net(clip)
    path = saved(cocoop, tmp_path / "model.pth.tar-10")
    want = Tuner(clip, NAMES, TuneConfig(ctx=cocoop, n_views=8)).tune_views(images[0])
    for given in (path, str(path), CoCoOp.load(path)):
        got = Tuner(clip, NAMES, TuneConfig(ctx=given, n_views=8)).tune_views(images[0])
        assert torch.equal(got.logits, want.logits)
    assert load_start(path, clip.text.width).normalised
    assert not load_start(path, clip.text.width, normalised=False).normalised
    official = Tuner(clip, NAMES, TuneConfig(ctx=path, n_views=10, method="official"))
    assert official.classes.start.normalised is False  # as the published code feeds it
    with pytest.raises(ValueError, match="it is CoCoOp's"):
        load_ctx(path, clip.text.width)
    plain = tmp_path / "coop.pth.tar"
    torch.save({"state_dict": {"ctx": cocoop.ctx}}, plain)
    assert torch.equal(load_start(plain, clip.text.width), cocoop.ctx)


def test_messages(clip, tmp_path):
    cocoop = meta_net(clip)

    def message(path):
        with pytest.raises(ValueError, match=r"^ctx: ") as caught:
            Tuner(clip, NAMES, TuneConfig(ctx=path))
        return str(caught.value)

    def without(name):
        path = saved(cocoop, tmp_path / "x.tar")
        content = torch.load(path, weights_only=False)
        del content["state_dict"][name]
        torch.save(content, path)
        return path

    assert "has a meta_net, but no meta_net.linear2.bias" in message(without("meta_net.linear2.bias"))
    assert "has a meta_net, but no ctx" in message(without("ctx"))
    assert "['ctx_att']: it is another method's" in message(saved(cocoop, tmp_path / "y.tar", ctx_att=torch.ones(2)))
    narrow = CoCoOp(cocoop.ctx[:, :3], cocoop.weight1, cocoop.bias1, cocoop.weight2[:3], cocoop.bias2[:3])
    assert "expected width" in message(narrow)
    other = CoCoOp(cocoop.ctx, torch.ones(WIDE, 7), cocoop.bias1, cocoop.weight2, cocoop.bias2)
    assert "net expects image features of width 7; the model's have" in message(other)
    with pytest.raises(ValueError, match="ctx: expected one for all images with method 'tda'"):
        Tuner(clip, NAMES, TuneConfig(ctx=cocoop, method="tda"))
    with pytest.raises(ValueError, match=re.escape("bias1: expected floating point [8], got torch.float32 [7]")):
        CoCoOp(cocoop.ctx, cocoop.weight1, torch.ones(7), cocoop.weight2, cocoop.bias2)
    with pytest.raises(ValueError, match="weight2: expected finite values"):
        CoCoOp(cocoop.ctx, cocoop.weight1, cocoop.bias1, cocoop.weight2 * torch.nan, cocoop.bias2)
    torch.save({"state_dict": {"ctx": cocoop.ctx}}, tmp_path / "z.tar")
    with pytest.raises(ValueError, match=r"has no 'meta_net\.': expected CoCoOp's"):
        CoCoOp.load(tmp_path / "z.tar")


# The published code's answers


@pytest.mark.numerics
@pytest.mark.parametrize("name", ["cocoop_1", "cocoop_2"])
def test_published_answers(model, case, folder, name):  # noqa: F811
    found, given = case(name)
    names = ("ctx", *(f"meta_net.linear{layer}.{what}" for layer in (1, 2) for what in ("weight", "bias")))
    normalised = str(found["convention"]) == "normalised"
    cocoop = CoCoOp(*(torch.from_numpy(found[f"state_{each}"]) for each in names), normalised)
    classnames = [str(each) for each in found["classnames"]]
    result = Tuner(model, classnames, TuneConfig(ctx=cocoop, method=family(found, Tpt))).tune_views(given)
    assert_close("ctx_init", result.ctx_init, found["ctx_init"][0])
    assert_close("zero_shot_logits", result.zero_shot_logits, found["logits_before"][0])
    assert result.selected.tolist() == found["selected"].tolist()
    assert_close("entropies", result.entropies, found["entropies"])
    assert_close("loss", torch.tensor(result.loss), found["step_loss"][0])
    assert_tuned({each: found[each][:, 0] if each != "lr" else found[each] for each in ("step_grad", "step_ctx", "lr")},
                 result, "ctx", int(found["steps"]))  # fmt: skip
    assert_close("logits", result.logits, found["logits"][0])
    own = Tuner(model, classnames, TuneConfig(ctx=CoCoOp(*cocoop.tensors()), method="zero_shot")).tune_views(given)
    assert_close("logits of CoCoOp's own code", own.logits, found["logits_own_view0"][0])
    if name == "cocoop_1":
        read = load_start(folder / "checkpoints" / "cocoop.pth.tar", 128)
        for one, other in zip(read.tensors(), cocoop.tensors(), strict=True):
            assert torch.equal(one, other.half().float())
