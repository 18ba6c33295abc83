"""What is read off models: their own preprocessing, wrappers around them, and layouts of other packages."""

from dataclasses import replace

import models
import open_clip
import pytest
import torch
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from torch import nn

import tpt_fast
from tpt_fast import TextEncoder, TuneConfig, Tuner
from tpt_fast.demo import PHOTO_FOLDER
from tpt_fast.methods.published import pil_views
from tpt_fast.models import read

NAMES = ["cat", "dog", "sports car"]
PHOTO = PHOTO_FOLDER / "rocket.jpg"
FEW = TuneConfig(n_views=4, rho=0.5)


def small(**cfg):
    model = models.clip(seed=0, vision={"image_size": 48, "layers": 1, "patch_size": 16})
    open_clip.model.set_model_preprocess_cfg(model, vars(PreprocessCfg(size=48, **cfg)))
    return model


OWN = [
    {"resize_mode": mode, "interpolation": by, **more}
    for mode in ("shortest", "squash")
    for by in ("bicubic", "bilinear")
    for more in ({}, {"mean": (0.5,) * 3, "std": (0.5,) * 3})
]


@pytest.mark.parametrize("cfg", OWN, ids=str)
@pytest.mark.parametrize("size", [(60, 91), (300, 41), (48, 48)])
def test_view_0_is_the_models_own_preprocessing_to_the_bit(cfg, size):
    model, image = small(**cfg), Image.open(PHOTO).convert("RGB").resize(size)
    own = image_transform_v2(PreprocessCfg(**model.visual.preprocess_cfg), is_train=False)(image)
    result = Tuner(model, NAMES, FEW)(image, keep_views=True)
    assert torch.equal(result.views[0], own)
    plain = Tuner(small(), NAMES, FEW)(image, keep_views=True)
    if "mean" not in cfg:  # the crops are what they always are
        assert torch.equal(result.views[1:], plain.views[1:])


@pytest.mark.parametrize("sides", [(48, 32), (32, 64)])
@pytest.mark.parametrize("mode", ["shortest", "squash", "longest"])
@pytest.mark.parametrize("by", ["bicubic", "bilinear"])
@pytest.mark.parametrize("size", [(60, 91), (300, 41), (48, 32), (31, 20)])
def test_images_that_are_no_squares(sides, mode, by, size):
    """Height before width, as open_clip's image_size has them; and towers of our own on them."""
    model = models.clip(seed=0, vision={"image_size": sides, "layers": 1, "patch_size": 16})
    cfg = PreprocessCfg(size=sides, resize_mode=mode, interpolation=by, fill_color=9)
    open_clip.model.set_model_preprocess_cfg(model, vars(cfg))
    image = Image.open(PHOTO).convert("RGB").resize(size)
    own = image_transform_v2(PreprocessCfg(**model.visual.preprocess_cfg), is_train=False)(image)
    tuner = Tuner(model, NAMES, FEW)
    result = tuner(image, keep_views=True)
    assert torch.equal(result.views[0], own)
    assert result.views.shape[1:] == (3, *sides)
    assert result.engines["image"] == "vit"
    with torch.no_grad():
        want = nn.functional.normalize(model.encode_image(result.views), dim=-1)
    assert (tuner.clip.encode(result.views[None])[0] - want).abs().max() < 1e-5
    assert torch.equal(tuner.tune_views(result.views).logits, result.logits)
    mixed = Tuner(model, NAMES, replace(FEW, views="augmix"))(image, keep_views=True)
    assert torch.equal(mixed.views[0], own)


FITTED = [{}, {"interpolation": "bilinear"}, {"fill_color": 255}, {"fill_color": 7, "mean": (0.5,) * 3}]


@pytest.mark.parametrize("cfg", FITTED, ids=str)
@pytest.mark.parametrize("size", [(60, 91), (300, 41), (41, 299), (48, 48), (31, 20), (480, 7), (9, 430), (49, 48)])
def test_view_0_that_is_fitted_and_padded(cfg, size):
    model, image = small(resize_mode="longest", **cfg), Image.open(PHOTO).convert("RGB").resize(size)
    own = image_transform_v2(PreprocessCfg(**model.visual.preprocess_cfg), is_train=False)(image)
    tuner = Tuner(model, NAMES, FEW)
    result = tuner(image, keep_views=True)
    assert torch.equal(result.views[0], own)
    whole = tpt_fast.make_views(image, 4, **tuner.preprocessing._asdict())
    assert torch.equal(result.views, whole)  # which came in patches
    plain = tpt_fast.make_views(image, 4, **tuner.preprocessing._replace(resize_mode="shortest")._asdict())
    assert torch.equal(whole[1:], plain[1:])  # the crops are what they always are


def test_fitted_views_of_augmix_and_of_slivers():
    cfg = {"size": 48, "resize_mode": "longest", "fill": 9}
    image = Image.open(PHOTO).convert("RGB").resize((60, 91))
    first = tpt_fast.make_views(image, 1, **cfg)[0]
    assert torch.equal(tpt_fast.make_views(image, 3, **cfg, views="augmix")[0], first)
    with pytest.raises(ValueError, match=r"image: 2 x 500 .* nothing of the shorter one is left"):
        tpt_fast.make_views(image.resize((500, 2)), 1, **cfg)
    with pytest.raises(ValueError, match="fill: expected"):
        tpt_fast.make_views(image, 1, **cfg | {"fill": 256})


def test_published_views_are_the_same():
    model = small(resize_mode="longest", fill_color=200)
    prepared, image = read(model).preprocessing, Image.open(PHOTO).convert("RGB").resize((60, 91))
    torch.manual_seed(0)
    views = pil_views(image, 3, prepared)
    assert torch.equal(tpt_fast.make_views(image, 3, **prepared._asdict()), views)


@pytest.mark.parametrize(
    "cfg", [{"resize_mode": "fit"}, {"interpolation": "nearest"}, {"fill_color": "red"}, {"fill_color": 300}], ids=str
)
def test_other_preprocessing_is_refused_by_name(cfg):
    model = small()
    model.visual.preprocess_cfg = model.visual.preprocess_cfg | cfg
    ((name, value),) = cfg.items()
    with pytest.raises(ValueError, match=f"model: visual.preprocess_cfg says {name} {value!r}, and .* are known here"):
        Tuner(model, NAMES)


def test_a_size_that_is_not_said_is_no_224():
    model = small()
    del model.visual.image_size
    with pytest.raises(ValueError, match="model: expected its image tower to say the size of its images"):
        Tuner(model, NAMES)


def test_wrappers_are_looked_through_or_refused():
    model = small()
    want = Tuner(model, NAMES, FEW)(PHOTO)
    for wrapped in (nn.DataParallel(model), torch.compile(model)):
        got = Tuner(wrapped, NAMES, FEW)(PHOTO)
        assert torch.equal(got.logits, want.logits)
        assert torch.equal(tpt_fast.tune(wrapped, PHOTO, NAMES, n_views=4, rho=0.5).logits, want.logits)
        assert TextEncoder(wrapped, NAMES).engine == "packed"
    model.visual = nn.DataParallel(model.visual)
    with pytest.raises(TypeError, match=r"expected its image tower itself, got a DataParallel; use visual.module"):
        Tuner(model, NAMES)


class OpenAiVisual(nn.Module):
    def __init__(self, size):
        super().__init__()
        self.input_resolution = size
        self.conv1 = nn.Conv2d(3, 16, size, bias=False)

    def forward(self, x):
        return self.conv1(x).flatten(1)


class OpenAiLike(nn.Module):
    """Laid out as OpenAI's package lays CLIP out: ``encode_text`` asks the image tower for its type, which says
    ``input_resolution``; the causal mask lies in the blocks."""

    def __init__(self, size):
        super().__init__()
        self.visual, self.context_length = OpenAiVisual(size), 77
        self.token_embedding = nn.Embedding(49408, 16)
        self.positional_embedding = nn.Parameter(0.01 * torch.randn(77, 16))
        layer = nn.TransformerEncoderLayer(16, 2, 32, 0.0, batch_first=True)
        self.transformer, self.ln_final = nn.TransformerEncoder(layer, 1), nn.LayerNorm(16)
        self.text_projection = nn.Parameter(torch.randn(16, 16))
        self.logit_scale = nn.Parameter(torch.tensor(4.6))

    @property
    def dtype(self):
        return self.visual.conv1.weight.dtype

    def encode_image(self, x):
        return self.visual(x.type(self.dtype))

    def encode_text(self, ids):
        x = self.token_embedding(ids).type(self.dtype) + self.positional_embedding.type(self.dtype)
        mask = nn.Transformer.generate_square_subsequent_mask(77, dtype=x.dtype)
        x = self.ln_final(self.transformer(x, mask, is_causal=True)).type(self.dtype)
        return x[torch.arange(len(x)), ids.argmax(-1)] @ self.text_projection


@pytest.mark.parametrize("size", [32, 48])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_models_in_openais_layout_run_by_their_own_code(size, dtype):
    torch.manual_seed(0)
    model = OpenAiLike(size).eval()
    ids = open_clip.get_tokenizer("ViT-B-32")([f"a photo of a {name}." for name in NAMES])
    with torch.no_grad():
        text = nn.functional.normalize(model.encode_text(ids), dim=-1)
        result = Tuner(model.to(dtype), NAMES, FEW)(PHOTO, keep_views=True)
        assert result.views.shape[-1] == size
        assert read(model).preprocessing.size == size
        image = nn.functional.normalize(model.float().encode_image(result.views[:1]), dim=-1)
    want = (model.logit_scale.exp() * image @ text.T)[0]
    # Half the weights' rounding, times the scale, where they came in 16 bits.
    bound = 1e-4 if dtype == torch.float32 else 100 * 2**-8
    assert (result.zero_shot_logits - want).abs().max() < bound
    assert (result.engines["text"], result.engines["image"]) == ("module", "module")
    assert "OpenAiLike has an encode_image of its own" in result.engines["why image"]
