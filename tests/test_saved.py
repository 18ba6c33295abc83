"""Contexts saved with their model's name, read back, refused elsewhere, and shown as words."""

import json

import models
import numpy as np
import open_clip
import pytest
import torch
from command_line import CAT, FEW, one_demo_model, plain_terminal, rows, run, said  # noqa: F401 (fixtures)
from safetensors.torch import save_file

import tpt_fast
from tpt_fast import TuneConfig, Tuner, demo
from tpt_fast.clip import Clip
from tpt_fast.prompting import CoCoOp
from tpt_fast.prompting.checkpoint import read_header
from tpt_fast.text.tower import TextTower

NAMES = ["cat", "dog", "steam locomotive"]


@pytest.fixture(scope="module")
def model():
    return models.clip(std=0.2)


@pytest.fixture
def views():
    return torch.randn(6, 3, 32, 32)


def saved(tmp_path, ctx, model, **options):
    tpt_fast.save_ctx(ctx, path := tmp_path / "ctx.safetensors", model, **options)
    return path


def test_a_tuned_context_goes_on_from_its_file(tmp_path, model, views):
    tuner = Tuner(model, NAMES)
    result = tuner.tune_views(views)
    path = saved(tmp_path, result.ctx, tuner, name="small")
    assert torch.equal(tpt_fast.load_ctx(path), result.ctx)
    header = read_header(path)
    assert (header["model"], header["name_at"], header["digest"]) == ("small", "end", tuner.clip.text.digest)
    again = Tuner(model, NAMES, TuneConfig(ctx=path, steps=0)).tune_views(views)
    assert torch.equal(again.logits, result.logits)
    encoder = tpt_fast.TextEncoder(model, NAMES, ctx=path)
    assert torch.equal(encoder.ctx_init, result.ctx)


def test_types_of_weights_are_one_model():
    """A model whose weights are numbers of float16 is the same in float16; another seed is another one."""
    half = models.clip().half()
    towers = [TextTower(model, engine="module") for model in (half, models.clip().half().float(), models.clip(seed=2))]
    first, same, other = (tower.digest for tower in towers)
    assert first == same != other
    scaled = models.clip().half()
    torch.nn.init.zeros_(scaled.logit_scale)  # the same embeddings under other towers
    assert TextTower(scaled, engine="module").digest != first


def test_another_model_is_refused_by_name(tmp_path, model, views):
    path = saved(tmp_path, torch.randn(4, 64), model, name="ViT-B-16, openai")
    other = models.clip(seed=2)
    for use in (
        lambda: Tuner(other, NAMES, TuneConfig(ctx=path)),
        lambda: tpt_fast.TextEncoder(other, NAMES, ctx=path),
    ):
        with pytest.raises(ValueError, match=r"is a context of ViT-B-16, openai .*tpt_fast.load_ctx"):
            use()
    nevertheless = Tuner(other, NAMES, TuneConfig(ctx=tpt_fast.load_ctx(path)))
    assert torch.equal(nevertheless.tune_views(views).ctx_init, tpt_fast.load_ctx(path))


@pytest.mark.parametrize(
    ("learned", "used", "fits"),
    [
        ("X X [CLS] X X", "X X [CLS] X X", True),
        ("[CLS] a b c d", "[CLS] X X X X", True),
        ("a photo of a", "X X X X [CLS]", True),
        ("X X [CLS] X X", "a photo of a", False),
        ("[CLS] X X X X", "X X [CLS] X X", False),
        ("X X X X", "[CLS] X X X X", False),
        ("X X [CLS] X X", "X [CLS] X X X", False),
    ],
)
def test_the_place_of_the_name_is_checked(tmp_path, model, learned, used, fits):
    path = saved(tmp_path, torch.randn(4, 64), model, ctx_init=learned)
    if fits:
        Tuner(model, NAMES, TuneConfig(ctx=path, ctx_init=used))
    else:
        with pytest.raises(ValueError, match="was learned with the class name at"):
            Tuner(model, NAMES, TuneConfig(ctx=path, ctx_init=used))


def test_contexts_of_classes_are_for_these_classes(tmp_path, model):
    ctx = torch.randn(3, 4, 64)
    path = saved(tmp_path, ctx, Tuner(model, NAMES, TuneConfig(ctx=ctx)))
    Tuner(model, ["cat", "dog", "steam_locomotive"], TuneConfig(ctx=path))
    with pytest.raises(ValueError, match=r"contexts of the classes \['cat', 'dog', 'steam locomotive'\], got"):
        Tuner(model, NAMES[::-1], TuneConfig(ctx=path))
    with pytest.raises(ValueError, match="classnames: expected 3"):
        saved(tmp_path, ctx, model, classnames=NAMES[:2])


@pytest.mark.parametrize("normalised", [True, False])
def test_a_cocoop_is_kept_whole(tmp_path, model, views, normalised):
    shapes = (4, 64), (2, 32), (2,), (64, 2), (64,)
    cocoop = CoCoOp(*(torch.randn(shape) for shape in shapes), normalised=normalised)
    path = saved(tmp_path, cocoop, model)
    again = tpt_fast.load_ctx(path)
    assert again.normalised == normalised
    assert all(map(torch.equal, cocoop.tensors(), again.tensors()))
    first, second = (Tuner(model, NAMES, TuneConfig(ctx=ctx)).tune_views(views) for ctx in (cocoop, path))
    assert torch.equal(first.logits, second.logits)
    with pytest.raises(ValueError, match="is a context of CLIP"):
        Tuner(models.clip(seed=2), NAMES, TuneConfig(ctx=path))


def test_what_is_none(tmp_path, model):
    with pytest.raises(ValueError, match="expected width 64"):
        saved(tmp_path, torch.randn(4, 32), model)
    with pytest.raises(ValueError, match="finite"):
        saved(tmp_path, torch.full((4, 64), torch.nan), model)
    with pytest.raises(TypeError, match="ctx: expected a tensor or a CoCoOp, got str"):
        saved(tmp_path, "a photo of a", model)
    with pytest.raises(TypeError, match="model: expected a model, a Clip or a Tuner, got str"):
        saved(tmp_path, torch.randn(4, 64), "ViT-B-16")
    assert not [*tmp_path.iterdir()]
    np.savez(tmp_path / "ctx.npz", ctx=np.zeros((4, 64)))
    np.save(tmp_path / "ctx.npy", np.zeros((4, 64)))
    for file, what in (("ctx.npz", r"NumPy's .npz; .* torch.from_numpy"), ("ctx.npy", r"NumPy's .npy; .*from_numpy")):
        with pytest.raises(ValueError, match=what):
            Tuner(model, NAMES, TuneConfig(ctx=tmp_path / file))


def test_safetensors_of_others(tmp_path, model):
    """No header: taken, as a checkpoint is. Other tensors: refused as in a checkpoint. A torn file: an error."""
    ctx = torch.randn(4, 64)
    save_file({"ctx": ctx}, path := tmp_path / "plain.safetensors")
    assert torch.equal(Tuner(model, NAMES, TuneConfig(ctx=path)).classes.text.ctx_init, ctx)
    save_file({"ctx": ctx, "compound_prompts_text.0": ctx.clone()}, other := tmp_path / "maple.safetensors")
    with pytest.raises(ValueError, match="MaPLe"):
        tpt_fast.load_ctx(other)
    torn = tmp_path / "torn.safetensors"
    torn.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(ValueError, match=r"torn.safetensors' cannot be read"):
        Tuner(model, NAMES, TuneConfig(ctx=torn))
    with pytest.raises(ValueError, match="cannot be read"):
        tpt_fast.load_ctx(torn)


# --- words


def test_words_are_their_own_nearest(model):
    tuner = Tuner(model, NAMES)
    for given in (tuner, tuner.clip, model):
        words = tpt_fast.nearest_words(tuner.classes.text.ctx_init, given, k=3)
        assert [near[0] for near in words] == [(word, 0.0) for word in ("a", "photo", "of", "a")]
        assert all(near[0].distance < near[1].distance <= near[2].distance for near in words)


def test_distances_and_pieces(model):
    table, tokenizer = model.token_embedding.weight.detach(), open_clip.SimpleTokenizer()
    piece = tokenizer.encoder["photo"]  # not at a word's end
    ctx = table[piece] + 1e-3 * torch.randn(64)
    (near,) = tpt_fast.nearest_words(ctx[None], model, k=2)
    apart = (table.double() - ctx.double()).norm(dim=-1)
    best = apart.topk(2, largest=False)
    # 64 squares, a sum and a root in float32 of a difference that is exact in its last bit.
    assert [each.distance for each in near] == pytest.approx(best.values.tolist(), rel=64 * 2**-23)
    assert near[0].text == "photo-"


def test_words_of_what_is_none(model):
    with pytest.raises(ValueError, match=r"expected \[n_ctx, 64\], got \[3, 4, 64\]; give one"):
        tpt_fast.nearest_words(torch.zeros(3, 4, 64), model)
    with pytest.raises(ValueError, match="k: expected 1 or more"):
        tpt_fast.nearest_words(torch.zeros(4, 64), model, k=0)
    simple = open_clip.SimpleTokenizer()
    with pytest.raises(TypeError, match=r"tokenizer: expected one with decode\(\), got function"):
        tpt_fast.nearest_words(
            torch.zeros(4, 64), Clip(model, tokenizer=lambda texts, context_length=77: simple(texts, context_length))
        )


# --- the command line


def test_words_of_a_file(tmp_path):
    model = demo.load().model
    ctx = TextTower(model, engine="module").embed(torch.tensor([[320, 1125]]))[0]  # "a photo"
    path = saved(tmp_path, ctx, model)
    found = rows(run("words", path, "--json", "--top", 2))
    assert [(row["vector"], row["words"][0]) for row in found] == [
        (1, {"word": "a", "distance": 0.0}),
        (2, {"word": "photo", "distance": 0.0}),
    ]
    table = run("words", path).stdout
    assert "photo 0.000" in table
    assert rows(run("tune", CAT, "--ctx", path, "--json", *FEW))[0]["label"]


def test_a_file_of_another_model_on_the_command_line(tmp_path):
    model = demo.load().model
    width = model.token_embedding.weight.shape[1]
    other = models.clip(text={"width": width})
    path, own = saved(tmp_path, torch.randn(4, width), other, ctx_init="[CLS] X X"), tmp_path / "own.safetensors"
    for command in (["words", path], ["tune", CAT, "--ctx", path, *FEW]):
        assert "is a context of CLIP" in said(run(*command, code=2))
    run("words", path, "--relabel", own)
    assert read_header(own)["name_at"] == "front"
    assert torch.equal(tpt_fast.load_ctx(own), tpt_fast.load_ctx(path))
    run("tune", CAT, "--ctx", own, "--ctx-init", "[CLS] X", "--json", *FEW)
    assert "--relabel" in said(run("words", path, "--relabel", tmp_path / "none" / "x.safetensors", code=2))


def test_words_of_classes(tmp_path):
    model = demo.load().model
    path = saved(tmp_path, torch.randn(2, 3, model.token_embedding.weight.shape[1]), model, classnames=["cat", "dog"])
    found = rows(run("words", path, "--json", "--top", 1))
    assert [(row["class"], row["vector"]) for row in found] == [(name, i) for name in ("cat", "dog") for i in (1, 2, 3)]
    assert json.loads(read_header(path)["classnames"]) == ["cat", "dog"]
