"""The image tower against open_clip's own ``encode_image``."""

import copy
import threading

import bounds
import models
import open_clip
import pytest
import torch
from torch import nn

from tpt_fast.demo import PHOTO_FOLDER
from tpt_fast.models import read
from tpt_fast.text import TextEncoder
from tpt_fast.views.make import CLIP_MEAN, CLIP_STD, make_views
from tpt_fast.vision import ImageEncoder
from tpt_fast.vision.resnet import PooledQuery

pytestmark = pytest.mark.numerics

RESNET = {**models.RESNET, "width": 8, "head_width": 16}
TEXT = {"context_length": 8, "vocab_size": 32, "width": 32, "layers": 1}


def small(kind="CLIP", quick_gelu=False, vision=models.VISION | {"layers": 3}, **changes):
    model = models.clip(kind, vision={**vision, **changes}, text=TEXT, quick_gelu=quick_gelu)
    for name, p in model.visual.named_parameters():
        if p.dim() in (2, 3) or "class_embedding" in name:
            nn.init.normal_(p, std=0.2)
        elif p.dim() == 1:
            p.data += 0.2 * torch.randn_like(p)
    return model


def patch_bias(model):
    conv = model.visual.conv1
    biased = nn.Conv2d(3, conv.out_channels, conv.kernel_size, conv.stride, bias=True)
    biased.weight = conv.weight
    model.visual.conv1 = biased
    return model


def used(model):
    """Batch norms that have seen something, so that folding them has something to do."""
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.running_mean.normal_(std=0.3)
            norm.running_var.uniform_(0.3, 3)
            norm.weight.data.uniform_(0.5, 1.5)
    return model


def frozen(model):
    open_clip.utils.freeze_batch_norm_2d(model.visual)
    return model


def no_projection(model):
    model.visual.proj = None
    return model


def no_qkv_bias(model):
    for block in model.visual.transformer.resblocks:
        block.attn.in_proj_bias = None
    return model


MODELS = {
    "gelu": lambda: small(),
    "quick gelu": lambda: small(quick_gelu=True),
    "one block": lambda: small(layers=1),
    "no ln_pre": lambda: small(no_ln_pre=True),
    "layer scale": lambda: small(ls_init_value=0.3),
    "norm after pooling": lambda: small(final_ln_after_pool=True),
    "patch dropout": lambda: small(patch_dropout=0.5),
    "tokens too": lambda: small(output_tokens=True),
    "eps": lambda: small(norm_kwargs={"eps": 1e-2}),
    "sines": lambda: small(pos_embed_type="sin_cos_2d"),
    "patches that leave a margin": lambda: small(image_size=37),
    "patch bias": lambda: patch_bias(small()),
    "no projection": lambda: no_projection(small()),
    "no qkv bias": lambda: no_qkv_bias(small()),
    "CustomTextCLIP": lambda: small("CustomTextCLIP"),
}
OTHERS = {
    "pools by 'avg'": lambda: small(pool_type="avg"),
    "pools by attention": lambda: small(attentional_pool=True, attn_pooler_queries=4, output_tokens=True),
    "CustomResidualAttentionBlock": lambda: small(qk_norm=True),
    "tanh": lambda: small(act_kwargs={"approximate": "tanh"}),
}
RESNETS = {
    "resnet": lambda: used(small(vision=RESNET)),
    "deeper": lambda: used(small(vision=RESNET, layers=[2, 1, 3, 1])),
    "frozen": lambda: frozen(used(small(vision=RESNET))),
}
ALL = {**MODELS, **RESNETS, **OTHERS}


def views_for(model, n=3, dtype=torch.float32):
    return torch.randn(n, 3, *[read(model).preprocessing.size] * 2).to(dtype)


@torch.no_grad()
def theirs(model, views):
    features = model.visual(views)
    features = features[0] if isinstance(features, tuple) else features
    return nn.functional.normalize(features, dim=-1)


def distance(got, want):
    return float((got.detach().double() - want.detach()).norm() / want.detach().norm())


def allowed(model, dtype=torch.float32):
    """Relative error of features by rounding in the model's image tower."""
    return bounds.rounding(bounds.chain(model.visual), dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("name", ALL)
def test_equals_encode_image(name, dtype):
    model = ALL[name]()
    bound = allowed(model, dtype)
    views, encoder = views_for(model), ImageEncoder(model, dtype)
    got = encoder.encode(views)
    assert got.dtype == dtype
    assert got.shape == (3, 64 if name == "no projection" else 32)
    want = theirs(model.double(), views.double())
    assert distance(got, want) < bound
    assert distance(want[0], want[1]) > 4 * bound  # or equality would say little


@pytest.mark.parametrize("name", [*MODELS, *RESNETS])
def test_own_executor(name):
    encoder = ImageEncoder(ALL[name](), torch.float32)
    assert (encoder.engine, encoder.why_module) == ("resnet" if name in RESNETS else "vit", None)


class Doubled(nn.Linear):
    """What a LoRA library puts in the place of a linear layer, from outside."""

    def forward(self, x):
        return 2 * super().forward(x)


def doubled(tower):
    old = tower.transformer.resblocks[0].mlp.c_fc
    tower.transformer.resblocks[0].mlp.c_fc = new = Doubled(old.in_features, old.out_features)
    new.load_state_dict(old.state_dict())


def one_more(tower):
    mlp = tower.transformer.resblocks[0].mlp
    parts = dict(mlp.named_children())
    tower.transformer.resblocks[0].mlp = nn.Sequential()
    for name in ("c_fc", "gelu", "adapter", "c_proj"):
        tower.transformer.resblocks[0].mlp.add_module(name, parts.get(name, nn.Softmax(-1)))


def forward_function(tower):
    block = tower.transformer.resblocks[1]
    own = block.forward
    block.forward = lambda *given, **options: 2 * own(*given, **options)


CHANGES = {
    "c_fc (Doubled) is not open_clip's": doubled,
    "MLP has other parts": one_more,
    "forward function of its own": forward_function,
    "has hooks": lambda tower: tower.transformer.resblocks[0].register_forward_hook(lambda _m, _x, y: y + 1),
    "ln_1 (LayerNorm) has hooks": lambda tower: tower.transformer.resblocks[0].ln_1.register_forward_pre_hook(
        lambda _m, x: (x[0] * x[0],)
    ),
}


@pytest.mark.parametrize("reason", CHANGES)
def test_changed_towers_run_their_own_code(reason):
    model = models.clip(vision={"layers": 3}, text={"width": 32})
    CHANGES[reason](model.visual)
    CHANGES[reason](model)
    encoder, text = ImageEncoder(model, torch.float32), TextEncoder(model, ["cat", "sea lion"])
    assert encoder.engine == text.engine == "module"
    assert reason in encoder.why_module
    assert reason in text.why_module
    views = views_for(model)
    assert distance(encoder.encode(views), theirs(model, views)) < 2 * allowed(model)
    with torch.no_grad():
        own = model.encode_text(text.prompts.ids, normalize=True)
    assert distance(text.initial()[0], own) < 2 * bounds.rounding(bounds.chain(model.transformer))


def test_an_encode_image_of_its_own():
    class Mirrored(open_clip.model.CLIP):
        def encode_image(self, image, normalize=False):
            return super().encode_image(image.flip(-1), normalize)

    model = small()
    model.__class__ = Mirrored
    encoder, views = ImageEncoder(model, torch.float32), views_for(model)
    assert encoder.why_module == "Mirrored has an encode_image of its own"
    assert distance(encoder.encode(views), theirs(model, views.flip(-1))) < 2 * allowed(model)


@pytest.mark.parametrize("name", OTHERS)
def test_module_with_a_reason(name):
    encoder = ImageEncoder(OTHERS[name](), torch.float32)
    assert encoder.engine == "module"
    assert name in encoder.why_module


@pytest.mark.parametrize(("dtype", "product"), [("float16", "torch"), ("bfloat16", "torch"), ("bfloat16", "own")])
@pytest.mark.parametrize("name", ["gelu", "quick gelu", "layer scale"])
def test_half_types_are_no_further_than_the_module(name, dtype, product, monkeypatch):
    monkeypatch.setenv("TPT_FAST_PRODUCT", product)
    dtype = getattr(torch, dtype)
    got, module = distances_of_half_types(ALL[name](), dtype)
    assert 0 < got < (1 + 8 / (2 * 16 * 32) ** 0.5) * module  # sizes known from 16 x 32 errors


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_types_of_a_folded_resnet_are_no_further_than_the_module(dtype):
    """Folded weights round elsewhere than the module's, now better, now worse, so this is about many draws of them."""
    both = []
    for seed in range(12):
        model = ALL["deeper"]()
        torch.manual_seed(seed)
        both.append(distances_of_half_types(used(model), dtype))
    both = torch.tensor(both)
    assert (both > 0).all()
    assert both[:, 0].mean() < (1 + 8 / (2 * 12 * 16 * 32) ** 0.5) * both[:, 1].mean()


def distances_of_half_types(model, dtype):
    """From float64: ours, and the module's in the same type."""
    views = views_for(model, 16)
    truth = theirs(copy.deepcopy(model).double(), views.double())
    module = theirs(copy.deepcopy(model).to(dtype), views.to(dtype))
    got = ImageEncoder(model, dtype).encode(views)
    assert got.dtype == torch.float32
    return distance(got, truth), distance(module, truth)


@pytest.mark.parametrize("name", ["gelu", "pools by 'avg'", "resnet"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_model_is_left_alone(name, dtype):
    model = ALL[name]().train()
    before = {k: (v, v.clone(), v._version) for k, v in model.state_dict(keep_vars=True).items()}
    modules = {k: id(m) for k, m in model.named_modules()}
    ImageEncoder(model, dtype).encode(views_for(model))
    assert {k: id(m) for k, m in model.named_modules()} == modules
    assert all(m.training for m in model.modules())
    for k, v in model.state_dict(keep_vars=True).items():
        same, value, version = before[k]
        assert v is same
        assert v._version == version
        assert v.dtype == torch.float32 or k.endswith("num_batches_tracked")
        assert torch.equal(v, value)
        assert not isinstance(v, nn.Parameter) or v.requires_grad


def test_weights_are_shared_in_the_models_own_type():
    model = small()
    encoder = ImageEncoder(model, torch.float32)
    theirs = {p.data_ptr() for p in model.parameters()}
    for block in encoder._tower._blocks:
        assert {m.matrix.weight.data_ptr() for m in (block.qkv, block.out, block.fc, block.proj)} <= theirs


@pytest.mark.parametrize(
    ("name", "size"),
    [("gelu", "vit.ROWS_A_THREAD"), ("resnet", "resnet.VIEWS_ON_A_CPU"), ("pools by 'avg'", "module.VIEWS_AT_ONCE")],
)
def test_groups_of_views_do_not_matter(name, size, monkeypatch):
    model = ALL[name]()
    views, encoder = views_for(model, 7), ImageEncoder(model, torch.float64)
    whole = encoder.encode(views)
    monkeypatch.setattr(f"tpt_fast.vision.{size}", 1)
    assert distance(encoder.encode(views), whole) < 2 * allowed(model, torch.float64)


@pytest.mark.parametrize("name", ["gelu", "patch bias"])
def test_views_that_come_cut_into_patches(name):
    model = MODELS[name]()
    encoder, photo = ImageEncoder(model, torch.float32), PHOTO_FOLDER / "cat.jpg"
    assert encoder.patch == 8
    views, cut = (make_views(photo, 5, 32, patch=patch) for patch in (None, encoder.patch))
    assert cut.shape == (5, 16, 192)
    assert torch.equal(encoder.whole(cut), views)
    assert torch.equal(encoder.encode(cut), encoder.encode(views))
    convolved = model.visual.conv1(views).flatten(2).transpose(1, 2)
    weight, bias = model.visual.conv1.weight.flatten(1), model.visual.conv1.bias
    product = bounds.product(cut, weight, bias)
    bounds.assert_within(nn.functional.linear(cut, weight, bias), convolved, 2 * product)


@pytest.mark.parametrize("name", ["patches that leave a margin", "resnet"])
def test_views_that_must_come_whole(name):
    encoder = ImageEncoder(ALL[name](), torch.float32)
    assert encoder.patch is None


def test_strided_and_few_views():
    model = small()
    encoder = ImageEncoder(model, torch.float32)
    views = views_for(model, 4)
    strided = views.contiguous(memory_format=torch.channels_last)[::2]
    assert distance(encoder.encode(strided), encoder.encode(views[::2].contiguous())) < 2 * allowed(model)
    assert encoder.encode(views[:0]).shape == (0, 32)
    assert encoder.encode(views[:1]).shape == (1, 32)


def test_repeats_and_threads_give_the_same_bits():
    model = small()
    encoder, views, found = ImageEncoder(model, torch.float32), [views_for(model) for _ in range(4)], {}
    threads = [threading.Thread(target=lambda i=i: found.update({i: encoder.encode(views[i])})) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(found[i], encoder.encode(views[i])) for i in range(4))


def test_pooled_query_is_the_first_of_all():
    torch.manual_seed(0)
    pool = open_clip.modified_resnet.AttentionPool2d(3, 32, 4, 16).double()
    x = torch.randn(2, 32, 3, 3, dtype=torch.float64)
    assert distance(PooledQuery(pool)(x), pool(x)) < 2 * bounds.rounding(bounds.chain(pool, 10), torch.float64)


def test_views_of_another_shape():
    encoder = ImageEncoder(small(), torch.float32)
    with pytest.raises(ValueError, match=r"views: expected \[N, 3, 32, 32\] or \[N, 16, 192\], got \[2, 3, 16, 16\]"):
        encoder.encode(torch.zeros(2, 3, 16, 16))
    with pytest.raises(ValueError, match=r"got \[3, 32, 32\]"):
        encoder.encode(torch.zeros(3, 32, 32))


def test_preprocessing():
    model = small()
    assert read(model).preprocessing == (32, CLIP_MEAN, CLIP_STD, "shortest", "bicubic", "round", 0)
    model.visual.image_mean, model.visual.image_std = [0.5, 0.5, 0.5], [0.25, 0.25, 0.25]
    assert read(model).preprocessing[:3] == (32, (0.5,) * 3, (0.25,) * 3)
    assert read(small(vision=RESNET)).preprocessing.size == 64


def test_a_resnet_with_another_pooling_runs_by_its_own_code():
    model = small(vision=RESNET)
    model.visual.attnpool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
    encoder = ImageEncoder(model, torch.float32)
    assert encoder.engine == "module"
    assert encoder.why_module == "the image tower has a Sequential, not CLIP's AttentionPool2d"
    views = views_for(model)
    assert distance(encoder.encode(views), theirs(model, views)) < 2 * allowed(model)


def test_models_that_are_refused():
    with pytest.raises(TypeError, match="image tower, got Linear"):
        ImageEncoder(nn.Linear(2, 2), torch.float32)
