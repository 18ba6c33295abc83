"""transformers' own CLIP models, with random weights: their features, tokens and pixels."""

import bounds
import models
import numpy as np
import pytest
import torch
import transformers
from models import TRANSFORMERS_TEXT, TRANSFORMERS_VISION, images
from models import of_transformers as make
from open_clip.tokenizer import SimpleTokenizer
from PIL import Image
from torch.nn.functional import normalize
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel

import tpt_fast
from tpt_fast import TextEncoder, TuneConfig, Tuner
from tpt_fast.clip import Clip
from tpt_fast.demo import PHOTO_FOLDER
from tpt_fast.models import read
from tpt_fast.vision import ImageEncoder

pytestmark = pytest.mark.numerics

NAMES = ["cat", "golden retriever", "sports_car"]
PHOTO = PHOTO_FOLDER / "rocket.jpg"
FEW = TuneConfig(n_views=4, rho=0.5)
BPE = SimpleTokenizer()


@pytest.fixture(scope="module")
def tokenizer():
    return models.transformers_tokenizer()


def features(output):
    return normalize(output if isinstance(output, torch.Tensor) else output.pooler_output, dim=-1)


CASES = {
    "quick_gelu": lambda: make(projection_dim=32),
    "gelu": lambda: make({"hidden_act": "gelu"}, {"hidden_act": "gelu"}, projection_dim=48),
    "eos 2": lambda: make({"eos_token_id": 2}),
    "eager": lambda: make(attn_implementation="eager"),
    "MetaClip2": lambda: make({"max_position_embeddings": 40}, kind="MetaClip2"),
}


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_features_are_the_models_own(name):
    model, views = CASES[name](), torch.randn(3, 3, 48, 48)
    text, image = TextEncoder(model, NAMES, tokenizer=BPE), ImageEncoder(read(model, images()), torch.float32)
    assert (text.engine, text.why_module, image.engine, image.why_module) == ("packed", None, "vit", None)
    for got, own in (
        (text.initial()[0], features(model.get_text_features(text.prompts.ids))),
        (image.encode(views), features(model.get_image_features(views))),
    ):
        assert (got - own).abs().max() < 1e-5
        assert (own[0] - own[1]).abs().max() > 1e-2  # or equality would say little


def test_the_shape_of_vit_b_32():
    torch.manual_seed(0)
    model, views = CLIPModel(CLIPConfig()).eval(), torch.randn(2, 3, 224, 224)
    clip = Clip(model)
    text = TextEncoder(clip.text, NAMES)
    with torch.no_grad():
        own = features(model.get_image_features(views)), features(model.get_text_features(text.prompts.ids))
    assert (clip.image.encode(views) - own[0]).abs().max() < 1e-5
    assert (text.initial()[0] - own[1]).abs().max() < 1e-5


def test_packed_and_its_own_code_agree_on_the_gradient():
    model = make()
    grad = torch.randn(3, model.projection_dim)
    slopes = []
    for engine in ("packed", "module"):
        text = TextEncoder(model, NAMES, tokenizer=BPE, engine=engine)
        assert text.engine == engine
        slopes.append(text.backward(text.initial()[1], grad))
    allowed = 2 * bounds.rounding(2 * bounds.chain(model.text_model))
    assert bounds.distance(*slopes) < allowed


class Mirrored(CLIPModel):
    def get_image_features(self, pixel_values, **options):
        return super().get_image_features(pixel_values.flip(-1), **options)

    def get_text_features(self, input_ids, **options):
        return super().get_text_features(input_ids.clamp(max=49406), **options)


class Doubled(torch.nn.Linear):
    """What a LoRA library puts in the place of a linear layer."""

    def forward(self, x):
        return 2 * super().forward(x)


def mirrored(model):
    model.__class__ = Mirrored


def doubled(model):
    for tower in (model.text_model, model.vision_model):
        mlp = tower.encoder.layers[0].mlp
        mlp.fc1, old = Doubled(64, 128), mlp.fc1
        mlp.fc1.load_state_dict(old.state_dict())


def hooked(model):
    for tower in (model.text_model, model.vision_model):
        tower.encoder.layers[1].register_forward_hook(lambda _m, _x, y: y + 1)


@pytest.mark.parametrize(
    ("change", "reason"), [(mirrored, "features of its own"), (doubled, "(Doubled) is not"), (hooked, "has hooks")]
)
def test_what_was_changed_runs_by_its_own_code(change, reason):
    model, views = make(), torch.randn(2, 3, 48, 48)
    change(model)
    clip = Clip(model, tokenizer=images())
    text = TextEncoder(clip.text, NAMES)
    assert reason in clip.image.why_module
    assert reason in text.why_module
    with torch.no_grad():
        own = features(model.get_image_features(views)), features(model.get_text_features(text.prompts.ids))
    allowed = 2 * bounds.rounding(2 * bounds.chain(model.text_model))
    assert bounds.distance(clip.image.encode(views), own[0]) < allowed
    assert bounds.distance(text.initial()[0], own[1]) < allowed


def test_tokens_are_those_of_both_libraries(tokenizer):
    model = make()
    texts = ["a photo of a cat.", "A  sports_car, don't!", "x " * 90]
    rows = read(model, tokenizer).tokenizer()(texts)
    ends = rows.argmax(-1)
    assert rows.shape == (3, 77)
    for row, theirs, end in zip(rows, BPE(texts), ends, strict=True):
        assert torch.equal(row[: end + 1], theirs[: end + 1])  # behind the end each fills up with its own
    by = [Tuner(model, NAMES, FEW, tokenizer=each)(PHOTO) for each in (None, tokenizer)]
    assert torch.equal(by[0].logits, by[1].logits)


PROCESSORS = {
    "shortest": lambda: images(),
    "squash": lambda: images(do_center_crop=False),
    "bilinear": lambda: images(resample=2),
    "mean": lambda: images(image_mean=[0.5] * 3, image_std=[0.25] * 3),
    "no normalisation": lambda: images(do_normalize=False),
}
PROCESSORS["squash"] = lambda: CLIPImageProcessorPil(size={"height": 48, "width": 48}, do_center_crop=False)


@pytest.mark.parametrize("name", PROCESSORS)
@pytest.mark.parametrize("size", [(60, 91), (91, 60), (300, 41), (47, 50), (48, 48)])
def test_view_0_is_the_processors_to_the_bit(name, size):
    processor, image = PROCESSORS[name](), Image.open(PHOTO).convert("RGB").resize(size)
    tuner = Tuner(make(), NAMES, FEW, tokenizer=processor)
    own = processor(image, return_tensors="pt").pixel_values[0]
    assert torch.equal(tuner(image, keep_views=True).views[0], torch.as_tensor(np.asarray(own)))


@pytest.mark.parametrize(
    ("processor", "message"),
    [
        (lambda: images(resample=1), "resample 1, and 3 .bicubic. and 2"),
        (lambda: images(do_rescale=False), "do_rescale False, and True is known"),
        (lambda: images(rescale_factor=1 / 127), "rescale_factor .*, and 1/255"),
        (lambda: images(64), "size {'shortest_edge': 64}, cut to .*; the model takes 48 x 48"),
        (lambda: images(do_center_crop=False), None),
    ],
)
def test_other_processors_are_refused_by_name(processor, message):
    if message is None:
        message = "size {'shortest_edge': 48}; the model takes 48 x 48"
    with pytest.raises(ValueError, match="model: its image processor says " + message):
        Tuner(make(), NAMES, tokenizer=processor())


def test_what_lies_beside_the_weights_is_read(tmp_path, tokenizer):
    model = make()
    model.save_pretrained(tmp_path)
    alone = CLIPModel.from_pretrained(tmp_path)
    assert Clip(alone).preprocessing == Clip(model).preprocessing
    assert torch.equal(Clip(alone).text.tokenizer(NAMES), BPE(NAMES))
    images(image_mean=[0.5] * 3).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    read_again = Clip(CLIPModel.from_pretrained(tmp_path))
    assert read_again.preprocessing.mean == (0.5,) * 3
    assert read_again.text.tokenizer(["a cat"])[0, -1] == tokenizer.pad_token_id


def test_a_processor_that_cannot_be_had_is_no_guess(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # or a minute goes by in trying again
    model = make()
    model.config._name_or_path = model.name_or_path = "nobody/has-this"
    with pytest.raises(ValueError, match="tokenizer: expected the processor of nobody/has-this, whose own cannot"):
        Tuner(model, NAMES)


def test_tuning(tokenizer):
    model = make()
    processor = transformers.CLIPProcessor(images(), tokenizer)
    result = tpt_fast.tune(torch.compile(model), PHOTO, NAMES, tokenizer=processor, n_views=4, rho=0.5)
    assert (result.engines["text"], result.engines["image"]) == ("packed", "vit")
    texts, image = [f"a photo of a {name.replace('_', ' ')}." for name in NAMES], Image.open(PHOTO).convert("RGB")
    with torch.no_grad():
        own = model(**processor(text=texts, images=image, padding=True, return_tensors="pt"))
    assert (result.zero_shot_logits - own.logits_per_image[0]).abs().max() < 1e-4
    by_module = Tuner(model, NAMES, TuneConfig(n_views=4, rho=0.5, engine="module"), tokenizer=processor)(PHOTO)
    assert (result.logits - by_module.logits).abs().max() < 1e-4


def siglip(**vision):
    torch.manual_seed(0)
    text = TRANSFORMERS_TEXT | {"vocab_size": 49408, "max_position_embeddings": 32, "projection_size": 64}
    return transformers.SiglipModel(
        transformers.SiglipConfig(text_config=text, vision_config=TRANSFORMERS_VISION | vision)
    ).eval()


def test_siglip_runs_by_its_own_code_uncut():
    model = siglip()
    processor = transformers.SiglipImageProcessorPil(size={"height": 48, "width": 48})
    tuner = Tuner(model, NAMES, FEW, tokenizer=processor)
    result = tuner(PHOTO, keep_views=True)
    text = tuner.classes.text
    assert text.describe()["tokens"] == 3 * 32
    assert "attention is not causal" in result.engines["why text"]
    assert "SiglipVision" in result.engines["why image"]
    pixels = processor(Image.open(PHOTO).convert("RGB"), return_tensors="pt").pixel_values
    assert torch.equal(result.views[0], torch.as_tensor(np.asarray(pixels))[0])
    with torch.no_grad():
        own = model(text.prompts.ids, torch.as_tensor(np.asarray(pixels))).logits_per_image[0]
    assert (result.zero_shot_logits - own).abs().max() < 1e-4
    with pytest.raises(ValueError, match="expected the processor of this SiglipModel"):
        Tuner(model, NAMES)


def test_other_models_are_refused_by_name():
    config = transformers.ViTConfig(**TRANSFORMERS_VISION)
    with pytest.raises(TypeError, match=r"expected one of transformers' CLIPModel, .*got transformers' ViTModel"):
        Tuner(transformers.ViTModel(config), NAMES)
