"""OpenAI's models, in the layout of its package, with random weights: through the fast towers; copies that differ, by
their own code."""

import bounds
import openai_layout
import pytest
import torch
from openai_layout import CLIP, convert_weights, make, resnet
from PIL import Image
from torch.nn.functional import normalize
from torchvision.transforms import CenterCrop, Compose, InterpolationMode, Normalize, Resize, ToTensor

import tpt_fast
from tpt_fast import TextEncoder, TuneConfig, Tuner
from tpt_fast.clip import Clip
from tpt_fast.demo import PHOTO_FOLDER
from tpt_fast.views.make import CLIP_MEAN, CLIP_STD

pytestmark = pytest.mark.numerics

NAMES = ["cat", "golden retriever", "sports_car"]
PHOTO = PHOTO_FOLDER / "rocket.jpg"
FEW = TuneConfig(n_views=4, rho=0.5)
MODELS = {"vit": make, "resnet": resnet}


@torch.no_grad()
def own(model, ids, views):
    return normalize(model.encode_text(ids), dim=-1), normalize(model.encode_image(views), dim=-1)


@pytest.mark.parametrize("kind", MODELS)
def test_features_are_the_models_own(kind):
    model = MODELS[kind]()
    clip, views = Clip(model), torch.randn(3, 3, *[model.visual.input_resolution] * 2)
    text = TextEncoder(clip.text, NAMES)
    assert (text.engine, text.why_module, clip.image.engine, clip.image.why_module) == ("packed", None, kind, None)
    for got, want in zip(
        (text.initial()[0], clip.image.encode(views)), own(model, text.prompts.ids, views), strict=True
    ):
        assert (got - want).abs().max() < 1e-5
        assert (want[0] - want[1]).abs().max() > 1e-2  # or equality would say little


@pytest.mark.parametrize("kind", MODELS)
def test_fp16_as_it_comes_on_a_gpu(kind):
    """Held to the same weights in float32, which is what runs unless another precision is asked for."""
    model = convert_weights(MODELS[kind]())
    assert model.dtype == torch.float16
    result = Tuner(model, NAMES, FEW)(PHOTO)
    wide = Tuner(convert_weights(MODELS[kind]()).float(), NAMES, FEW)(PHOTO)
    assert result.engines == wide.engines
    assert torch.equal(result.logits, wide.logits)


@pytest.mark.parametrize("engine", ["packed", "module"])
def test_in_16_bits(engine):
    """Its LayerNorm computes in float32, with weights in float32."""
    model = make()
    half, whole = (TextEncoder(model, NAMES, engine=engine, precision=each) for each in ("fp16", "fp32"))
    bound = bounds.halved(model.transformer, torch.float16)
    assert bounds.distance(half.initial()[0], whole.initial()[0]) < bound


@pytest.mark.parametrize("kind", MODELS)
def test_by_its_own_code_under_autocast(kind):
    """As the published loop runs it."""
    model, config = MODELS[kind](), {"n_views": 4, "rho": 0.5}
    result = Tuner(model, NAMES, TuneConfig(**config, strict_official=True, precision="fp16"))(PHOTO)
    assert (result.engines["text"], result.engines["image"]) == ("module", "module")
    want = Tuner(model, NAMES, TuneConfig(**config))(PHOTO).zero_shot_logits
    assert (result.zero_shot_logits - want).abs().max() < 100 * bounds.halved(model, torch.float16)


@pytest.mark.parametrize("size", [(60, 91), (300, 41), (48, 48)])
def test_view_0_is_the_packages_own_to_the_bit(size):
    image = Image.open(PHOTO).convert("RGB").resize(size)
    theirs = Compose([
        Resize(48, interpolation=InterpolationMode.BICUBIC), CenterCrop(48), ToTensor(), Normalize(CLIP_MEAN, CLIP_STD),
    ])  # fmt: skip
    assert torch.equal(Tuner(make(), NAMES, FEW)(image, keep_views=True).views[0], theirs(image))


def test_packed_and_its_own_code_agree():
    model = make()
    results = [Tuner(model, NAMES, TuneConfig(n_views=4, rho=0.5, engine=each))(PHOTO) for each in ("auto", "module")]
    assert [each.engines["text"] for each in results] == ["packed", "module"]
    assert (results[0].logits - results[1].logits).abs().max() < 1e-4
    text = TextEncoder(model, NAMES, engine="module")
    assert text.describe()["tokens"] == 3 * int(text.prompts.lengths.max())  # cut, as a causal tower may be


def in_the_copy(kind):
    """As if it stood in the copy's file."""
    kind.__module__ = openai_layout.__name__
    return kind


@in_the_copy
class Mirrored(CLIP):
    def encode_image(self, image):
        return super().encode_image(image.flip(-1))

    def encode_text(self, text):
        x = self.token_embedding(text).type(self.dtype) + self.positional_embedding.type(self.dtype)
        x = self.transformer(x.transpose(0, 1)).transpose(0, 1)
        return self.ln_final(x).mean(1) @ self.text_projection  # of the padding too


@in_the_copy
class QuickGELU(torch.nn.Module):
    def forward(self, x):
        return torch.nn.functional.gelu(x)


@in_the_copy
class Later(openai_layout.Bottleneck):
    """Norms elsewhere than right behind their convolutions."""

    def forward(self, x):
        out = self.bn2(self.relu(self.conv2(self.relu(self.bn1(self.conv1(x))))))
        out = self.bn3(self.conv3(self.avgpool(out)))
        return self.relu(out + (x if self.downsample is None else self.downsample(x)))


def with_gelu():
    model = make()
    for tower in (model, model.visual):
        for block in tower.transformer.resblocks:
            block.mlp.gelu = QuickGELU()
    return model


def norm_later():
    model = resnet()
    for part in model.modules():
        if type(part) is openai_layout.Bottleneck:
            part.__class__ = Later
    return model


def adapted():
    model = make()
    for tower in (model, model.visual):
        tower.transformer.resblocks[0].mlp.gelu = torch.nn.Sequential(QuickGELU(), Adapter())
    return model


class Adapter(torch.nn.Identity):
    """Of somebody else's file."""


def hooked():
    model = make()
    for tower in (model, model.visual):
        tower.transformer.resblocks[1].register_forward_hook(lambda _m, _x, y: y + 1)
    return model


def uncausal():
    model = make()
    for block in model.transformer.resblocks:
        block.attn_mask = None
    return model


@pytest.mark.parametrize(
    ("changed", "text", "image"),
    [
        (lambda: make(Mirrored), "Mirrored.encode_text gives other features than OpenAI's", "Mirrored.encode_image"),
        (with_gelu, "CLIP.encode_text gives other features", "CLIP.encode_image gives other features"),
        (norm_later, None, "CLIP.encode_image gives other features"),
        (adapted, "(Adapter) is not openai_layout's or torch's", "(Adapter) is not openai_layout's or torch's"),
        (hooked, "has hooks", "has hooks"),
        (uncausal, "attention mask is not the causal one", None),
    ],
)
def test_copies_that_differ_run_by_their_own_code(changed, text, image):
    model = changed()
    clip, views = Clip(model), torch.randn(2, 3, *[model.visual.input_resolution] * 2)
    encoder = TextEncoder(clip.text, NAMES)
    for reason, found in ((text, encoder.why_module), (image, clip.image.why_module)):
        assert found is None if reason is None else reason in found
    if text is not None:
        assert encoder.describe()["tokens"] == 3 * 77  # what is not known to be causal is not cut
    wanted, seen = own(model, encoder.prompts.ids, views)
    allowed = 2 * bounds.rounding(2 * bounds.chain(model))
    assert bounds.distance(encoder.initial()[0], wanted) < allowed
    assert bounds.distance(clip.image.encode(views), seen) < allowed


def test_the_model_is_left_alone():
    model = make().train()
    before = {name: (p, p.clone()) for name, p in model.named_parameters()}
    masks = [block.attn_mask for block in model.transformer.resblocks]
    for engine in ("auto", "module"):
        Tuner(model, NAMES, TuneConfig(n_views=4, rho=0.5, engine=engine))(PHOTO)
    assert all(part.training for part in model.modules())
    assert all(p is before[name][0] and torch.equal(p, before[name][1]) for name, p in model.named_parameters())
    assert all(
        b.attn_mask is m and m.shape == (77, 77) for b, m in zip(model.transformer.resblocks, masks, strict=True)
    )


def test_features_that_are_all_alike_show_nothing():
    model = make()
    model.visual.conv1.weight.data.zero_()
    model.text_projection.data.zero_()[:, 0] = 1
    clip = Clip(model)
    assert "encode_image gives the same features for everything" in clip.image.why_module
    assert "encode_text gives the same features for everything" in clip.text.why_module


def test_a_size_that_is_not_said():
    model = make()
    del model.visual.input_resolution
    with pytest.raises(ValueError, match="model: expected its image tower to say the size of its images"):
        Tuner(model, NAMES)


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")
def test_archives_are_refused_with_the_way_out():
    class Constant(torch.nn.Module):
        def forward(self, x):
            return x

    for call in (Tuner, TextEncoder):
        with pytest.raises(TypeError, match=r"model: .* TorchScript .* by clip.load\(..., jit=False\)"):
            call(torch.jit.script(Constant()), NAMES)


def test_wrapped():
    result = tpt_fast.tune(torch.nn.DataParallel(make()), PHOTO, NAMES, n_views=4, rho=0.5)
    assert (result.engines["text"], result.engines["image"]) == ("packed", "vit")
