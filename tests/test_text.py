"""The text tower against the model's own 77-token ``encode_text`` in float64, and its public behaviour."""

import copy
import threading

import bounds
import models
import open_clip
import pytest
import torch
from torch import nn
from torch.nn.functional import normalize

from tpt_fast.text import TextEncoder

pytestmark = pytest.mark.numerics

NAMES = ("tench", "great white shark", "dog", "dog", " ".join("abcdefghijklmnopqrstuvwxyzabcdefgh"))


def make(custom=False, quick_gelu=False, seed=0, **text):
    """A small model, its weights spread so that classes differ and no branch of a block is negligible."""
    vision = {"layers": 1, "width": 32, "patch_size": 16}
    kind = "CustomTextCLIP" if custom else "CLIP"
    model = models.clip(kind, seed, 24, vision=vision, text={"heads": 4, **text}, quick_gelu=quick_gelu)
    for name, p in model.named_parameters():
        if "visual" not in name:
            nn.init.normal_(p, std=0.3 if "embedding" in name else p.shape[-1] ** -0.5 if p.ndim > 1 else 0.2)
    return model


def tower_of(name, layers):
    """The text tower of one of open_clip's models, with fewer blocks and a small image tower."""
    config = open_clip.get_model_config(name)
    return make(
        custom="custom_text" in config,
        quick_gelu=config.get("quick_gelu", False),
        **config["text_cfg"] | {"layers": layers},
    )


def published(model, encoder, ctx):
    """Features by the published way: whole prompts of 77 tokens through the model's modules, in float64."""
    prompts, root = encoder.prompts, getattr(model, "text", model)
    rows = torch.arange(len(prompts.ids))[:, None].expand_as(prompts.positions)
    x = root.token_embedding(prompts.ids).index_put((rows, prompts.positions), ctx.expand(len(rows), -1, -1))
    x = root.ln_final(root.transformer(x + root.positional_embedding, attn_mask=root.attn_mask))
    x = x[torch.arange(len(rows)), prompts.ids.argmax(-1)]
    projection = root.text_projection
    if projection is not None:
        x = projection(x) if isinstance(projection, nn.Linear) else x @ projection
    return normalize(x, dim=-1)


def allowed(model, dtype=torch.float32):
    """Relative error of a context gradient, and so of features, by rounding in the model's text tower."""
    tower = getattr(model, "text", None) or nn.ModuleList([model.transformer, model.ln_final])
    return bounds.rounding(2 * bounds.chain(tower), dtype)


def error(value, truth):
    return bounds.distance(value, truth)


def compare(model, names, dtype, engine="packed", **options):
    """Relative errors of features and context gradient, at the initial context and off it."""
    encoder = TextEncoder(copy.deepcopy(model).to(dtype), names, engine=engine, **options)
    assert encoder.engine == engine
    exact = copy.deepcopy(model).double()
    noise = torch.Generator().manual_seed(1)
    errors = []
    for step in (0.0, 0.1):
        start = encoder.ctx_init.double()
        ctx = (start + step * torch.randn(start.shape, generator=noise).double()).to(dtype)
        leaf = ctx.double().requires_grad_()
        truth = published(exact, encoder, leaf)
        grad = torch.randn(truth.shape, generator=noise, dtype=torch.float64)
        (slope,) = torch.autograd.grad(truth, leaf, grad)
        features, tape = encoder.forward(ctx, keep=True)
        errors += [error(features, truth.detach()), error(encoder.backward(tape, grad.to(features.dtype)), slope)]
    return max(errors)


@pytest.mark.parametrize("name", ["ViT-B-16", "ViT-B-32", "ViT-L-14", "RN50", "RN50-quickgelu", "ViTamin-S"])
def test_equals_the_models_own_tower(name):
    model = tower_of(name, layers=2)
    assert isinstance(model, open_clip.model.CustomTextCLIP if name == "ViTamin-S" else open_clip.model.CLIP)
    for dtype in (torch.float64, torch.float32):
        assert compare(model, NAMES[:2], dtype) < allowed(model, dtype)


def test_a_whole_tower():
    model = tower_of("ViT-B-16", layers=12)
    assert compare(model, NAMES[:2], torch.float32) < allowed(model)


MODELS = {
    "gelu": {},
    "quick_gelu": {"quick_gelu": True, "layers": 3},
    "one block": {"layers": 1},
    "custom text": {"custom": True},
    "layer scale, projection with bias": {"custom": True, "ls_init_value": 0.3, "proj_bias": True},
    "no projection": {"custom": True, "proj_type": "none", "layers": 1},
    "eos": {"pool_type": "eos", "eos_id": 49407},
    "wide mlp, short context": {"mlp_ratio": 6.0, "context_length": 50, "heads": 1},
}
CONTEXTS = {
    "end": {},
    "middle": {"ctx_init": "a photo [CLS] in the wild"},
    "front": {"ctx_init": "[CLS] of a thing"},
    "random": {"n_ctx": 7},
    "class-specific": {"ctx": torch.randn(5, 3, 64, generator=torch.Generator().manual_seed(2))},
}


@pytest.mark.parametrize("engine", ["packed", "module"])
@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.parametrize("model", MODELS)
def test_models_and_contexts(model, context, engine):
    model = make(**MODELS[model])
    assert compare(model, NAMES, torch.float64, engine, **CONTEXTS[context]) < allowed(model, torch.float64)


@pytest.mark.parametrize("engine", ["packed", "module"])
@pytest.mark.parametrize("count", [1, 2, 37])
def test_numbers_of_classes(count, engine):
    names = [f"{NAMES[i % 4]} {'x ' * (i % 5)}{i}" for i in range(count)]
    model = make(layers=2, width=32)
    assert compare(model, names, torch.float32, engine) < allowed(model)


def test_a_thousand_classes():
    """In one run through the published way, for it is slow."""
    names, model = [f"{NAMES[i % 4]} {'x ' * (i % 5)}{i}" for i in range(1000)], make(layers=1, width=32, heads=1)
    packed, module = (TextEncoder(model, names, engine=engine) for engine in ("packed", "module"))
    exact, grad = copy.deepcopy(model).double(), torch.randn(1000, 24, dtype=torch.float64)
    leaf = packed.ctx_init.double().requires_grad_()
    truth = published(exact, packed, leaf)
    (slope,) = torch.autograd.grad(truth, leaf, grad)
    for encoder in (packed, module):
        features, tape = encoder.initial()
        assert error(features, truth) < allowed(model)
        assert error(encoder.backward(tape, grad.float()), slope) < allowed(model)
    assert packed.describe()["chunks"] > 1


@pytest.mark.parametrize("context", ["end", "middle"])
def test_names_of_1_to_60_tokens(context):
    names = [" ".join("abcdefghij"[(i + j) % 10] for j in range(i)) for i in (1, 2, 3, 5, 9, 16, 31, 59, 60)]
    assert compare(make(), names, torch.float32, **CONTEXTS[context]) < allowed(make())


@pytest.mark.parametrize("engine", ["packed", "module"])
@pytest.mark.parametrize("context", ["end", "middle", "front"])
def test_steps_1_to_3(context, engine):
    """AdamW on a linear function of the features: contexts and features stay together, step after step."""
    model = make().double()
    encoder = TextEncoder(model, NAMES, engine=engine, **CONTEXTS[context])
    ours, theirs = (nn.Parameter(encoder.ctx_init.clone()) for _ in range(2))
    optimizers = [torch.optim.AdamW([ctx], lr=5e-3) for ctx in (ours, theirs)]
    target = torch.randn(len(NAMES), 24, dtype=torch.float64)
    for _ in range(3):
        got, want = encoder.encode(ours), published(model, encoder, theirs)
        assert error(got, want) < allowed(model, torch.float64)
        for optimizer, features in zip(optimizers, (got, want), strict=True):
            optimizer.zero_grad()
            (features * target).sum().backward()
            optimizer.step()
        # A step goes by the gradient over its own size: rounding counts where the gradient is small.
        assert error(ours, theirs) < 1e3 * allowed(model, torch.float64)
    assert error(ours, encoder.ctx_init) > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "product"), [("float16", "torch"), ("bfloat16", "torch"), ("bfloat16", "own")])
@pytest.mark.parametrize("context", ["end", "middle"])
def test_half_precision_is_no_worse_than_the_module(dtype, product, context, monkeypatch):
    """On the average of some models: of any one, either may be off by half as much again."""
    monkeypatch.setenv("TPT_FAST_PRODUCT", product)
    dtype = getattr(torch, dtype)
    errors = {"packed": 0.0, "module": 0.0}
    for seed in range(8):
        model = make(layers=3, seed=seed)
        for engine in errors:
            errors[engine] += compare(model, NAMES, dtype, engine, **CONTEXTS[context])
    # Sizes known from the features of eight models.
    assert errors["packed"] < (1 + 8 / (2 * 8 * len(NAMES) * 24) ** 0.5) * errors["module"]


@pytest.mark.parametrize("precision", ["fp16", "bf16", "fp32"])
def test_precision_converts_once_and_leaves_the_model(precision):
    model = make()
    encoder = TextEncoder(model, NAMES, precision=precision)
    features = encoder.encode(encoder.ctx_init)
    assert features.dtype == torch.float32
    stored = bounds.halved(
        model.transformer, {"fp16": torch.float16, "bf16": torch.bfloat16}.get(precision, torch.float32)
    )
    assert error(features, published(model.double(), encoder, encoder.ctx_init.double())) < stored
    with pytest.raises(ValueError, match="precision: expected one of fp32, fp16, bf16 or None, got 'int8'"):
        TextEncoder(model, NAMES, precision="int8")


@pytest.mark.parametrize("engine", ["packed", "module"])
def test_tiny_gradients_survive_half_precision(engine):
    encoder = TextEncoder(make(), NAMES, precision="fp16", engine=engine)
    features, tape = encoder.initial()
    grad = torch.randn(features.shape)
    one, small = encoder.backward(tape, grad), encoder.backward(tape, grad * 2.0**-20)
    torch.testing.assert_close(small * 2.0**20, one, rtol=0, atol=0)
    assert torch.equal(encoder.backward(tape, torch.zeros_like(features)), torch.zeros_like(one))


@pytest.mark.parametrize("engine", ["packed", "module"])
def test_encode_is_differentiable_for_one_and_for_several_contexts(engine):
    model = make().double()
    encoder, bound = TextEncoder(model, NAMES[:3], engine=engine), allowed(model, torch.float64)
    ctx = encoder.ctx_init + 0.1 * torch.randn(3, *encoder.ctx_init.shape, dtype=torch.float64)
    both = encoder.encode(ctx.requires_grad_())
    grad = torch.randn_like(both)
    (slopes,) = torch.autograd.grad(both, ctx, grad)
    for b in range(3):
        one = ctx[b].detach().requires_grad_()
        features = encoder.encode(one)
        assert error(features, both[b]) < bound
        assert error(torch.autograd.grad(features, one, grad[b])[0], slopes[b]) < bound
    assert torch.autograd.gradcheck(
        lambda c: encoder.encode(c)[:, :3], ctx[0].detach()[:, :].requires_grad_(), fast_mode=True
    )


@pytest.mark.parametrize("engine", ["packed", "module"])
def test_images_share_the_initial_tape(engine):
    encoder = TextEncoder(make(), NAMES, engine=engine)
    features, tape = encoder.initial()
    assert encoder.initial()[1] is tape
    grads = torch.randn(3, *features.shape)
    together = encoder.backward(tape, grads)
    assert together.shape == (3, *encoder.ctx_init.shape)
    for grad, slope in zip(grads, together, strict=True):
        assert torch.equal(encoder.backward(tape, grad), slope)


@pytest.mark.parametrize("engine", ["packed", "module"])
def test_chunks_and_recomputed_activations_change_nothing(engine, monkeypatch):
    from tpt_fast.text import memory, module

    model, grad = make(), torch.randn(len(NAMES), 24)
    whole = TextEncoder(model, NAMES, engine=engine)
    monkeypatch.setitem(memory.ROWS_AT_ONCE, "cpu", 12)
    pieces = TextEncoder(model, NAMES, engine=engine)
    recomputed = TextEncoder(model, NAMES, engine=engine, activations="recompute")
    monkeypatch.setattr(memory, "KEPT_BYTES", pieces.describe()["kept_bytes"] // 2)
    partly = TextEncoder(model, NAMES, engine=engine)
    monkeypatch.setattr(module, "free_bytes", lambda device: 1)
    starved = TextEncoder(model, NAMES, engine=engine)
    features, tape = whole.initial()
    slope = whole.backward(tape, grad)
    for encoder in (pieces, recomputed, partly, starved):
        assert error(encoder.initial()[0], features) < 2 * allowed(model)
        assert error(encoder.backward(encoder.initial()[1], grad), slope) < 2 * allowed(model)
    assert recomputed.describe()["kept_bytes"] == 0
    if engine == "packed":
        assert pieces.describe()["chunks"] >= 3
        assert 0 < partly.describe()["kept_chunks"] < partly.describe()["chunks"]
    else:
        assert starved.describe()["chunk"] == 1


@pytest.mark.parametrize("engine", ["packed", "module"])
def test_the_model_is_untouched_and_threads_agree(engine):
    model = make().train()
    model.set_grad_checkpointing(True)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    encoder = TextEncoder(model, NAMES, engine=engine)
    contexts = [encoder.ctx_init + 0.05 * i for i in range(6)]
    grads = torch.randn(6, len(NAMES), 24)
    results = {}

    def work(i):
        features, tape = encoder.forward(contexts[i], keep=True)
        results[i] = features, encoder.backward(tape, grads[i]), encoder.backward(encoder.initial()[1], grads[i])

    threads = [threading.Thread(target=work, args=(i,)) for i in range(6)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    parallel = dict(results)
    for i in range(6):
        work(i)
        for one, two in zip(parallel[i], results[i], strict=True):
            assert error(one, two) < 2 * allowed(model)
    assert model.training
    assert model.transformer.grad_checkpointing
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("engine", ["packed", "module"])
def test_seeded_and_repeatable(engine):
    model = make()
    one, two = (TextEncoder(model, NAMES, n_ctx=5, seed=3, engine=engine) for _ in range(2))
    assert torch.equal(one.ctx_init, two.ctx_init)
    assert not torch.equal(one.ctx_init, TextEncoder(model, NAMES, n_ctx=5, seed=4, engine=engine).ctx_init)
    (f1, t1), (f2, t2) = one.initial(), two.initial()
    assert torch.equal(f1, f2)
    assert torch.equal(one.backward(t1, f1 * f1), two.backward(t2, f1 * f1))


def test_duplicate_names_have_equal_features():
    features = TextEncoder(make(), NAMES).initial()[0]
    assert torch.equal(features[2], features[3])


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ({"no_causal_mask": True}, "not causal"),
        ({"embed_cls": True}, "class token"),
        ({"pool_type": "last"}, "pools by 'last'"),
        ({"qk_norm": True}, "CustomResidualAttentionBlock"),
        ({"scale_fc": True}, "CustomResidualAttentionBlock"),
    ],
)
def test_other_towers_run_through_their_own_module(text, reason):
    model = make(custom=True, **text).double()
    with pytest.raises(ValueError, match=f"engine: 'packed' cannot represent this model: .*{reason}"):
        TextEncoder(model, NAMES, engine="packed")
    encoder = TextEncoder(model, NAMES)
    assert encoder.engine == "module"
    assert reason in encoder.why_module
    # At the initial context the prompts are plain sentences, which the model can encode by itself.
    own = model.encode_text(encoder.prompts.ids, normalize=True).detach()
    assert error(encoder.encode(encoder.ctx_init), own) < allowed(model, torch.float64)
    assert torch.autograd.gradcheck(
        lambda c: encoder.encode(c)[:2, :2], encoder.ctx_init.requires_grad_(), fast_mode=True
    )


def padded_with_end(texts, context_length=77):
    """Hugging Face's tokenizer of CLIP."""
    ids = open_clip.SimpleTokenizer()(texts, context_length)
    return torch.where(ids == 0, 49407, ids)


@pytest.mark.parametrize("engine", ["packed", "module"])
@pytest.mark.parametrize("tokenizer", [padded_with_end, lambda texts: padded_with_end(texts)])
@pytest.mark.parametrize("text", [{}, {"pool_type": "eos", "eos_id": 49407}])
def test_padding_by_the_end_token(engine, tokenizer, text):
    model = make(**text)
    encoder = TextEncoder(model, NAMES, tokenizer=tokenizer, engine=engine)
    own = model.encode_text(open_clip.SimpleTokenizer()([f"a photo of a {n}." for n in NAMES]), normalize=True)
    assert error(encoder.encode(encoder.ctx_init), own) < 2 * allowed(model)


@pytest.mark.parametrize("eos", [2, 49406, 320])  # nowhere in the prompts, their first token, one of the context's
def test_a_tower_that_reads_elsewhere_runs_through_its_own_module(eos):
    model = make(pool_type="eos", eos_id=eos).double()
    encoder = TextEncoder(model, NAMES)
    assert encoder.engine == "module"
    assert "does not read these prompts at a token behind" in encoder.why_module
    own = model.encode_text(encoder.prompts.ids, normalize=True)
    assert error(encoder.encode(encoder.ctx_init), own) < allowed(model, torch.float64)


def test_a_token_embedding_of_another_kind():
    class Scaled(nn.Embedding):
        def forward(self, ids):
            return 3 * super().forward(ids)

    model = make().double()
    scaled = Scaled(49408, 64, dtype=torch.float64)
    scaled.weight = model.token_embedding.weight
    model.token_embedding = scaled
    encoder = TextEncoder(model, NAMES)
    assert "(Scaled) is not open_clip's" in encoder.why_module
    own = model.encode_text(encoder.prompts.ids, normalize=True)
    assert error(encoder.encode(encoder.ctx_init), own) < allowed(model, torch.float64)


class HuggingFaceLike(nn.Module):
    """As open_clip's wrapper of Hugging Face towers looks from outside: mean over all tokens that are not padding."""

    class Transformer(nn.Module):
        def __init__(self, width):
            super().__init__()
            self.words, self.mix = nn.Embedding(49408, width), nn.Linear(width, width)

        def get_input_embeddings(self):
            return self.words

        def set_input_embeddings(self, words):
            self.words = words

    def __init__(self, width=16):
        super().__init__()
        self.transformer, self.context_length = self.Transformer(width), 77

    def forward(self, ids):
        keep = (ids != 0).unsqueeze(-1)
        return (self.transformer.mix(self.transformer.words(ids)).tanh() * keep).sum(1)


def test_hugging_face_towers_run_through_their_own_module():
    torch.manual_seed(0)
    model = make(custom=True, layers=1)
    model.text = HuggingFaceLike()
    tokenizer = open_clip.SimpleTokenizer()
    with pytest.raises(ValueError, match=r"engine: 'packed' cannot represent this model: .*not open_clip's own"):
        TextEncoder(model, NAMES, engine="packed", tokenizer=tokenizer)
    encoder = TextEncoder(model, NAMES, tokenizer=tokenizer)
    assert encoder.engine == "module"
    assert "HuggingFaceLike" in encoder.why_module
    own = normalize(model.text(encoder.prompts.ids), dim=-1)
    assert error(encoder.encode(encoder.ctx_init), own) < 2 * allowed(model)
    leaf = encoder.ctx_init.clone().requires_grad_()
    assert torch.autograd.grad(encoder.encode(leaf).sum(), leaf)[0].abs().max() > 0


def test_result_and_doctor_say_what_the_tower_chose(monkeypatch):
    from tpt_fast import TuneConfig, Tuner, doctor
    from tpt_fast.text import memory

    model, views = make(), torch.randn(4, 3, 32, 32)
    monkeypatch.setitem(memory.ROWS_AT_ONCE, "cpu", 12)
    pieces = Tuner(model, NAMES, TuneConfig(n_views=4)).tune_views(views).text
    assert pieces["engine"] == "packed"
    assert pieces["tokens"] < pieces["tokens_before"]
    assert pieces["chunks"] > 1
    assert pieces["kept_bytes"] > 0
    assert Tuner(model, NAMES, TuneConfig(n_views=4, activations="recompute")).tune_views(views).text["kept_bytes"] == 0
    module = Tuner(model, NAMES, TuneConfig(n_views=4, engine="module")).tune_views(views).text
    assert (module["engine"], module["why_module"]) == ("module", "engine='module' was asked for")
    assert doctor.examine().found["text tower"]["tokens at once"] == 12


def test_messages():
    model = make()
    with pytest.raises(TypeError, match="model: expected an open_clip CLIP or CustomTextCLIP with a text tower"):
        TextEncoder(model.visual, NAMES)
    with pytest.raises(ValueError, match="engine: expected one of auto, packed, module, got 'fast'"):
        TextEncoder(model, NAMES, engine="fast")
    with pytest.raises(ValueError, match="activations: expected one of"):
        TextEncoder(model, NAMES, activations="drop")
    with pytest.raises(ValueError, match="ctx: expected one context for each of 5 classes, got 4"):
        TextEncoder(model, NAMES, ctx=torch.zeros(4, 3, 64))
    with pytest.raises(ValueError, match="n_ctx: expected 3"):
        TextEncoder(model, NAMES, ctx=torch.zeros(3, 64), n_ctx=4)
    with pytest.raises(ValueError, match="tokenizer: the model's vocabulary has 100 tokens"):
        TextEncoder(make(vocab_size=100), NAMES)
    encoder = TextEncoder(model, NAMES)
    with pytest.raises(ValueError, match=r"ctx: expected \[4, 64\] or \[B, 4, 64\], got \[5, 64\]"):
        encoder.encode(torch.zeros(5, 64))
    with pytest.raises(TypeError, match=r"ctx: expected a floating point tensor, got torch.int64"):
        encoder.encode(torch.zeros(4, 64).long())
