"""Score maps against a plain implementation through open_clip's own modules, and against GEM's package."""

import copy
import sys
from itertools import pairwise
from types import ModuleType

import bounds
import models
import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from test_vision import MODELS, allowed, distance, small, views_for
from torch import nn

import tpt_fast
from tpt_fast import demo, dense
from tpt_fast.clip import Clip
from tpt_fast.dense import score_map, scores
from tpt_fast.vision import ImageEncoder

pytestmark = pytest.mark.numerics

NAMES = ["cat", "a meadow", "tower"]
PHOTO = Image.open(demo.PHOTO_FOLDER / "cat.jpg").convert("RGB")


def plain_patches(visual, views, std):
    """Patch features by the tower's modules: NACLIP's last block by its equation, patch by patch; None for the raw."""
    x = visual._embeds(views)
    *blocks, last = visual.transformer.resblocks
    for block in blocks:
        x = block(x)
    if std is None:
        x = last(x)[:, 1:]
    else:
        attention, normed = last.attn, last.ln_1(x)
        w, b = attention.in_proj_weight, attention.in_proj_bias
        _, k, v = nn.functional.linear(normed, w, b).unflatten(-1, (3, attention.num_heads, -1)).unbind(2)
        rows, columns = visual.grid_size
        places = [(i, j) for i in range(rows) for j in range(columns)]
        x = []
        for at, (i, j) in enumerate(places, 1):
            scores = torch.einsum("nhd,nlhd->nlh", k[:, at], k) / attention.head_dim**0.5
            near = [np.exp(-((i - m) ** 2 + (j - n) ** 2) / (2 * std**2)) for m, n in places]
            scores += torch.tensor([0.0, *near], dtype=scores.dtype)[:, None]
            x.append(torch.einsum("nlh,nlhd->nhd", scores.softmax(1), v).flatten(1))
        x = last.ls_1(attention.out_proj(torch.stack(x, 1)))
    x = visual.ln_post(x)
    return nn.functional.normalize(x if visual.proj is None else x @ visual.proj, dim=-1)


@torch.no_grad()
def plain_map(model, tokenizer, image, names, std, size, stride):
    side, (rows, columns) = model.visual.image_size[0], model.visual.grid_size
    texts = model.encode_text(tokenizer([f"a photo of a {name}." for name in names]), normalize=True)
    width, height = image.size
    factor = size / min(width, height)
    small = image.resize((int(width * factor), int(height * factor)), Image.BICUBIC)
    pixels = torch.from_numpy(np.array(small)).permute(2, 0, 1) / 255
    mean, deviation = (torch.tensor(t)[:, None, None] for t in (model.visual.image_mean, model.visual.image_std))
    pixels = (pixels - mean) / deviation
    total, count = torch.zeros(len(names), *pixels.shape[1:]), torch.zeros(pixels.shape[1:])
    tops, lefts = ({*range(0, n - side, stride), n - side} for n in pixels.shape[1:])
    for y in tops:
        for x in lefts:
            window = pixels[None, :, y : y + side, x : x + side]
            found = (plain_patches(model.visual, window, std)[0] @ texts.T).T.reshape(1, -1, rows, columns)
            total[:, y : y + side, x : x + side] += nn.functional.interpolate(found, (side, side), mode="bilinear")[0]
            count[y : y + side, x : x + side] += 1
    return nn.functional.interpolate((total / count)[None], (height, width), mode="bilinear")[0]


def with_statistics(model):
    """What open_clip's factory adds to a tower."""
    model.visual.image_mean, model.visual.image_std = open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD
    return model


@pytest.fixture(scope="module")
def model():
    """32 px in patches of 8, whose weights are wide enough for places and classes to differ."""
    return with_statistics(models.clip(std=0.2))


@pytest.fixture(scope="module")
def tokenizer():
    return open_clip.SimpleTokenizer()


@pytest.fixture(scope="module")
def vit():
    """open_clip's ViT-B/16, wide as above."""
    torch.manual_seed(0)
    model = open_clip.create_model("ViT-B-16").eval()
    for p in model.visual.parameters():
        if p.dim() > 1:
            nn.init.normal_(p, std=0.05)
    return model


@pytest.mark.parametrize("tokens", ["neighbourhood", "raw"])
def test_vit_b_16(vit, tokenizer, tokens):
    """To 1e-4, as asked."""
    options = {"size": 224, "stride": 160}
    got = score_map(vit, PHOTO, NAMES, tokens=tokens, **options)
    assert got.shape == (3, PHOTO.height, PHOTO.width)
    assert got.dtype == torch.float32
    want = plain_map(vit, tokenizer, PHOTO, NAMES, 5.0 if tokens == "neighbourhood" else None, **options)
    assert (got - want).abs().max() < 1e-4
    assert want.std() > 1e-2


def test_raw_maps_are_those_of_gem(vit, tokenizer, monkeypatch):
    """The package of GEM's authors gives maps of the tower's own patch tokens too (``return_ori``); its others are of
    another attention. It wraps every block here: those that it leaves take the first dimension for the batch now."""
    monkeypatch.setitem(sys.modules, "cv2", ModuleType("cv2"))  # it only draws by it
    wrapper = pytest.importorskip("gem.gem_wrapper", reason="pip install --no-deps gem_torch einops")
    square = PHOTO.resize((224, 224))
    gem = wrapper.GEMWrapper(copy.deepcopy(vit), tokenizer, depth=1 + len(vit.visual.transformer.resblocks))
    with torch.no_grad():
        want = gem(tpt_fast.make_views(square, 1), NAMES, normalize=False, return_ori=True)[0]
    assert (score_map(vit, square, NAMES, tokens="raw", size=224) - want).abs().max() < 1e-4
    assert want.std() > 1e-2


@pytest.mark.parametrize("std", [None, 0.7, 5.0])
@pytest.mark.parametrize("name", MODELS)
def test_patches_of_every_tower_that_is_our_own(name, std):
    """In float64, to its rounding."""
    model = MODELS[name]()
    views, encoder = views_for(model).double(), ImageEncoder(model, torch.float64)
    if encoder.patch is None:
        with pytest.raises(ValueError, match="patch tokens can be read; its patches do not fill its images"):
            encoder.encode_patches(views)
        return
    bias = None if std is None else dense.gaussian(encoder.patch_grid()[0], std)
    got = encoder.encode_patches(views, bias)
    with torch.no_grad():
        want = plain_patches(model.double().visual, views, std)
    assert got.shape == want.shape == (3, 16, 64 if name == "no projection" else 32)
    assert distance(got, want) < 2 * allowed(model, torch.float64)
    assert distance(want[:, 0], want[:, 15]) > 0.01


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("std", [None, 5.0])
def test_patches_in_half_types(dtype, std):
    model = small()
    views, bias = views_for(model), None if std is None else dense.gaussian(4, std)
    with torch.no_grad():
        want = plain_patches(model.visual, views, std)
    got = ImageEncoder(model, dtype).encode_patches(views.to(dtype), bias)
    assert got.dtype == torch.float32
    assert 0 < distance(got, want) < bounds.halved(model.visual, dtype)


def test_views_cut_into_patches_and_groups_of_views_do_not_matter(monkeypatch):
    model = small()
    encoder, bias = ImageEncoder(model, torch.float32), dense.gaussian(4, 5.0)
    whole, cut = (tpt_fast.make_views(PHOTO, 5, 32, patch=patch) for patch in (None, 8))
    want = encoder.encode_patches(whole, bias)
    assert torch.equal(encoder.encode_patches(cut, bias), want)
    monkeypatch.setattr("tpt_fast.vision.vit.ROWS_A_THREAD", 1)
    assert distance(encoder.encode_patches(whole, bias), want) < 2 * allowed(model)
    assert encoder.encode_patches(whole[:0], bias).shape == (0, 16, 32)


# --- the map


def test_small_model(model, tokenizer):
    """Many windows of an odd image, an odd stride, a tall image."""
    for image in (PHOTO.resize((57, 33)), PHOTO.resize((40, 70))):
        for options in ({"size": 45, "stride": 7}, {"size": 33, "stride": 32}, {}):
            got = score_map(model, image, NAMES, std=1.5, **options)
            want = plain_map(model, tokenizer, image, NAMES, 1.5, **({"size": 48, "stride": 16} | options))
            assert got.shape == want.shape
            assert (got - want).abs().max() < 2 * bounds.logits(model, torch.float32, torch.float32)
            assert want.std() > 0.05
            assert (score_map(model, image, NAMES, std=1.4, **options) - want).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("length", "side", "stride"), [(32, 32, 16), (33, 32, 16), (100, 32, 32), (96, 32, 32), (64, 32, 5)]
)
def test_windows_cover_the_image(length, side, stride):
    places = dense.places(length, side, stride)
    assert places == sorted(set(places))
    assert {at for place in places for at in range(place, place + side)} == set(range(length))
    assert all(b - a <= stride for a, b in pairwise(places))
    assert len(places) == -(-(length - side) // stride) + 1


def test_windows_that_do_not_overlap_are_maps_of_their_own(model):
    wide = PHOTO.resize((64, 32))
    got = score_map(model, wide, NAMES, size=32, stride=32)
    halves = [score_map(model, wide.crop((x, 0, x + 32, 32)), NAMES, size=32) for x in (0, 32)]
    assert (got - torch.cat(halves, -1)).abs().max() < 2 * bounds.logits(model, torch.float32, torch.float32)


def test_a_model_of_rectangular_images_is_refused():
    model = models.clip(seed=0, vision={"image_size": (48, 32), "layers": 1, "patch_size": 16})
    with pytest.raises(ValueError, match=r"model: expected one of square images.*its are 48 x 32"):
        score_map(model, PHOTO, NAMES)


def test_windows_at_once_do_not_matter(model, monkeypatch):
    want = score_map(model, PHOTO, NAMES, stride=8)
    monkeypatch.setattr(dense, "WINDOWS_AT_ONCE", 3)
    assert (score_map(model, PHOTO, NAMES, stride=8) - want).abs().max() < 1e-5


def test_the_images_own_prompt(model, tokenizer):
    clip = Clip(model, tokenizer=tokenizer)
    tuner = tpt_fast.Tuner(clip, NAMES, tpt_fast.TuneConfig(n_views=8, lr=0.05))
    ctx = tuner(PHOTO).ctx
    initial, tuned = (score_map(clip, PHOTO, NAMES, each) for each in (None, ctx))
    assert torch.equal(initial, score_map(model, PHOTO, NAMES))
    assert torch.equal(initial, score_map(clip, PHOTO, NAMES, tuner.classes.text.ctx_init))
    features = tuner.classes.text.encode(ctx)
    assert torch.equal(tuned, scores(clip, PHOTO, features))
    assert (tuned - initial).abs().max() > 1e-3
    with pytest.raises(ValueError, match=r"ctx: expected width 64"):
        score_map(clip, PHOTO, NAMES, torch.zeros(4, 63))


def test_where_the_name_stands(model):
    words, ctx = "a [CLS] photo", torch.randn(2, 64)
    assert not torch.equal(*(score_map(model, PHOTO, NAMES, ctx, ctx_init=init) for init in (words, "a photo")))


def test_names_that_repeat(model):
    got = score_map(model, PHOTO, ["cat", "dog", "cat"])
    assert torch.equal(got[0], got[2])


def test_prompts_of_ones_own(model, tokenizer):
    """Means over templates, as NACLIP takes."""
    tuner = tpt_fast.Tuner(model, NAMES)
    features = tuner.classes.prototypes(["a photo of a {}.", "art of a {}."])
    assert scores(tuner.clip, PHOTO, features).shape == (3, PHOTO.height, PHOTO.width)


def test_precisions(model):
    want = score_map(model, PHOTO, NAMES)
    got = score_map(Clip(model, "bf16"), PHOTO, NAMES)
    assert got.dtype == torch.float32
    assert 0 < (got - want).abs().max() < bounds.logits(model, torch.float32, torch.bfloat16)


def test_callers_modes_and_defaults(model):
    want = score_map(model, PHOTO, NAMES)
    torch.set_default_dtype(torch.float64)
    try:
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16), torch.device("meta"):
            got = score_map(model, PHOTO, NAMES)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(got, want)


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda: demo.load().model, "it is a ResNet, which has none"),
        (lambda: models.clip(vision=models.RESNET), "it is a ResNet, which has none"),
        (lambda: models.clip(vision={"pool_type": "avg"}), "pools by 'avg'"),
        (lambda: models.clip(vision={"image_size": 37}), "its patches do not fill its images"),
        (lambda: models.clip(vision={"patch_size": (16, 8)}), "its patches are 16 x 8"),
        (lambda: Clip(models.clip(), "fp16", autocast=True), "engine='module' was asked for"),
    ],
)
def test_models_without_patches_that_can_be_read(make, why):
    with pytest.raises(
        ValueError, match=f"model: expected a vision transformer whose patch tokens can be read; .*{why}"
    ):
        score_map(make(), PHOTO, NAMES)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"tokens": "keys"}, ValueError, "tokens: expected one of neighbourhood, raw, got 'keys'"),
        ({"std": 0}, ValueError, "std: expected a number above 0, got 0"),
        ({"std": "5"}, TypeError, "std: expected a number above 0, got str"),
        ({"size": 31}, ValueError, "size: expected 32 to 32768, got 31"),
        ({"size": 48.0}, TypeError, "size: expected an int"),
        ({"stride": 33}, ValueError, "stride: expected 1 to 32, got 33"),
        ({"stride": 0}, ValueError, "stride: expected 1 to 32, got 0"),
    ],
)
def test_bad_options(model, options, error, message):
    with pytest.raises(error, match=message):
        score_map(model, PHOTO, NAMES, **options)


def test_bad_arguments(model, tokenizer):
    clip = Clip(model, tokenizer=tokenizer)
    with pytest.raises(ValueError, match="tokenizer: expected None with a Clip"):
        score_map(clip, PHOTO, NAMES, tokenizer=tokenizer)
    with pytest.raises(TypeError, match=r"features: expected floating point \[C, D\], got torch.int64 \[3, 32\]"):
        scores(clip, PHOTO, torch.zeros(3, 32, dtype=torch.int64))
    with pytest.raises(ValueError, match="features: expected width 32, of the image's, got 31"):
        scores(clip, PHOTO, torch.zeros(3, 31))
    with pytest.raises(ValueError, match="classnames: expected at least one name"):
        score_map(clip, PHOTO, [])
    with pytest.raises(FileNotFoundError):
        score_map(clip, "absent.jpg", NAMES)


def test_a_map_that_does_not_fit_in_memory(model, monkeypatch):
    monkeypatch.setattr(dense, "free_bytes", lambda device: 10_000)
    with pytest.raises(ValueError, match=r"image: expected one whose map fits.* 3 classes at 300 x 451 pixels"):
        score_map(model, PHOTO, NAMES)
