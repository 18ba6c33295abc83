"""open_clip's families beside CLIP, made small, with random weights: how each runs, why, and that it is the model's own
features; the table in docs/models.md says the same."""

import copy
import json
from pathlib import Path

import bounds
import models
import open_clip
import pytest
import timm
import torch
import transformers
from command_line import one_demo_model, plain_terminal, rows, run  # noqa: F401
from torch.nn.functional import normalize

from tpt_fast import TextEncoder, TuneConfig, Tuner, doctor
from tpt_fast.demo import PHOTO_FOLDER
from tpt_fast.models import read

pytestmark = pytest.mark.numerics

NAMES = ["cat", "golden retriever", "sports_car"]
PAGE = Path(__file__).resolve().parent.parent / "docs" / "models.md"
PHOTO = PHOTO_FOLDER / "rocket.jpg"
FEW = TuneConfig(n_views=4, rho=0.5)
TEXT = {"width": 64, "heads": 2, "layers": 2}
VIT = {"depth": 2, "embed_dim": 64, "num_heads": 2, "img_size": 64}
FAST_VIT = {"layers": (1, 1, 1, 1), "embed_dims": (16, 32, 64, 128)}
BERT = transformers.BertConfig(
    vocab_size=3000, pad_token_id=0, hidden_size=64, num_hidden_layers=2, num_attention_heads=2, intermediate_size=128,
    max_position_embeddings=256,
)  # fmt: skip
PLAIN = {"image_size": 64, "width": 64, "layers": 2, "head_width": 32, "patch_size": 16}
BIOMED = {
    "embed_dim": 64,
    "vision_cfg": {"timm_model_name": "vit_base_patch16_224", "timm_pool": "", "timm_proj": "linear", "image_size": 64},
    "text_cfg": {
        "hf_model_name": "bert", "hf_model_pretrained": False, "hf_proj_type": "mlp", "context_length": 256,
        "hf_pooler_type": "cls_last_hidden_state_pooler",
    },
    "custom_text": True,
}  # fmt: skip

# Family: one of its names in open_clip (or a configuration), changes of the text tower and of timm's or open_clip's
# image tower; why each tower runs by the module, or the engine that does not; whether the length is cut.
CASES = {
    "SigLIP": ("ViT-B-16-SigLIP", {"vocab_size": 3000}, VIT, "pools by 'last'", "a TimmModel", False),
    "SigLIP 2": ("ViT-B-16-SigLIP2", {"vocab_size": 3000}, VIT, "pools by 'last'", "a TimmModel", False),
    "BiomedCLIP": (BIOMED, None, VIT, "a HFTextEncoder, not open_clip's own transformer", "a TimmModel", True),
    "MobileCLIP-B, MobileCLIP2-B": ("MobileCLIP-B", {}, {"depth": 1, "img_size": 64}, "packed", "a TimmModel", True),
    "MobileCLIP-S1, S2": ("MobileCLIP-S1", {}, FAST_VIT, "is not causal (no_causal_mask)", "a TimmModel", False),
    "MobileCLIP2-S0 to S4, L-14": (
        "MobileCLIP2-S0",
        {},
        FAST_VIT,
        "is not causal (no_causal_mask)",
        "a TimmModel",
        False,
    ),
    "CoCa": ("coca_ViT-B-32", {}, PLAIN, "an appended class token (embed_cls)", "pools by attention", False),
    "EVA-02": ("EVA02-B-16", {}, VIT, "packed", "a TimmModel", True),
    "PE-Core": ("PE-Core-B-16", {}, VIT, "packed", "a TimmModel", True),
    "MetaCLIP 2": ("ViT-H-14-worldwide", {"vocab_size": 3000}, PLAIN, "packed", "vit", True),
}


def config(name, text, vision):
    cfg = copy.deepcopy(open_clip.get_model_config(name) if isinstance(name, str) else name)
    cfg["embed_dim"] = 64
    if text is not None:
        cfg["text_cfg"] |= TEXT | text
    if "timm_model_name" in cfg["vision_cfg"]:
        cfg["vision_cfg"]["image_size"] = 64
    else:
        cfg["vision_cfg"] |= vision
    if "multimodal_cfg" in cfg:
        cfg["multimodal_cfg"] |= TEXT
    return cfg


@pytest.fixture
def make(monkeypatch):
    """A family's model in evaluation mode, with its tokenizer, None for CLIP's."""

    def make(family):
        name, text, vision, *_ = CASES[family]
        cfg, create = config(name, text, vision), timm.create_model
        monkeypatch.setattr(timm, "create_model", lambda name, **options: create(name, **(options | vision)))
        monkeypatch.setattr(open_clip.hf_model.AutoConfig, "from_pretrained", lambda *_a, **_k: BERT)
        kind = "CoCa" if "multimodal_cfg" in cfg else "CustomTextCLIP" if cfg.pop("custom_text", False) else "CLIP"
        cfg.pop("custom_text", None)
        torch.manual_seed(0)
        model = getattr(open_clip.model, kind, None) or open_clip.coca_model.CoCa
        model = model(**cfg).eval()
        for name, p in model.named_parameters():
            if p.dim() == 2:
                torch.nn.init.normal_(p, std=0.15)
            elif p.dim() == 4:
                torch.nn.init.normal_(p, std=(2 / p[0].numel()) ** 0.5)
            if name.endswith("gamma"):  # of branches, which begin at next to nothing
                torch.nn.init.normal_(p, std=0.5)
        return model, None if read(model).embedding.num_embeddings == 49408 else words

    return make


def words(texts, context_length=77):
    """Numbers of words, an end, and padding."""
    ids = torch.zeros(len(texts), context_length, dtype=torch.int64)
    for row, text in zip(ids, texts, strict=True):
        found = [5, *(10 + sum(map(ord, word)) for word in text.replace(".", " .").split()), 2]
        row[: len(found)] = torch.tensor(found)
    return ids


@pytest.mark.parametrize("family", CASES)
@torch.no_grad()
def test_how_it_runs_and_that_it_is_the_models_own(make, family):
    *_, text, image, cut = CASES[family]
    model, tokenizer = make(family)
    tuner = Tuner(model, NAMES, FEW, tokenizer=tokenizer)
    result = tuner(PHOTO, keep_views=True)
    found = doctor.towers(model, tokenizer)
    for what, wanted in (("text", text), ("image", image)):
        if wanted in ("packed", "vit"):
            assert result.engines[what] == found[what] == wanted
            assert f"why {what}" not in result.engines
        else:
            assert result.engines[what] == "module"
            assert wanted in result.engines[f"why {what}"]
            assert found[what] == f"module: {result.engines[f'why {what}']}"

    encoder = tuner.classes.text
    ids, length = encoder.prompts.ids, encoder.prompts.ids.shape[1]
    own = normalize(read(model).encode_text(ids), dim=-1)
    seen = model.encode_image(result.views)
    seen = normalize(seen[0] if isinstance(seen, tuple) else seen, dim=-1)
    assert (encoder.initial()[0] - own).abs().max() < 1e-5
    assert (tuner.clip.image.encode(result.views) - seen).abs().max() < 1e-5
    for features in (own, seen):
        assert (features[0] - features[1]).abs().max() > 1e-3  # or equality would say little

    # A tower that reads what is behind a prompt's end may not be cut.
    assert (encoder.describe()["tokens"] < len(NAMES) * length) == cut
    behind = torch.arange(length) >= encoder.prompts.lengths[:, None]
    changed = (normalize(read(model).encode_text(ids.masked_fill(behind, 7)), dim=-1) - own).abs().max()
    if not cut:
        assert changed > 1e-3
    elif text == "packed":
        assert changed < 1e-5

    tokens = "up to its end" if cut else "all"
    if PAGE.is_file():
        assert f"| {family} | {found['text']} | {tokens} | {found['image']} |" in PAGE.read_text("utf-8")


@pytest.mark.parametrize("family", CASES)
def test_gradient(make, family):
    model, tokenizer = make(family)
    encoder = TextEncoder(model, NAMES, tokenizer=tokenizer)
    plain = TextEncoder(model, NAMES, tokenizer=tokenizer, engine="module")
    grad = torch.randn(3, 64)
    slopes = [each.backward(each.initial()[1], grad) for each in (encoder, plain)]
    assert bounds.distance(*slopes) < 2 * bounds.rounding(2 * bounds.chain(read(model).text))


def test_doctor_shows_it(tmp_path):
    (tmp_path / "small-coca.json").write_text(json.dumps(config("coca_ViT-B-32", {}, PLAIN)))
    open_clip.add_model_config(tmp_path / "small-coca.json")
    (report,) = rows(run("doctor", "--json", "--model", "small-coca"))
    assert report["found"]["small-coca"] == {
        "text": "module: the text tower reads an appended class token (embed_cls)",
        "image": "module: the image tower pools by attention",
    }


def test_open_clips_adapter_of_tokenizers_is_called_itself(tmp_path):
    """SigLIP's takes capitals and punctuation off before the tokenizer of transformers that it holds sees a text."""
    models.transformers_tokenizer().save_pretrained(tmp_path)
    adapter = open_clip.tokenizer.HFTokenizer(str(tmp_path), context_length=77, clean="canonicalize")
    encoder = TextEncoder(models.clip(), ["Cat", "SPORTS_CAR"], tokenizer=adapter)
    assert torch.equal(encoder.prompts.ids, adapter(["a photo of a Cat.", "a photo of a SPORTS CAR."]))
    assert not torch.equal(encoder.prompts.ids, TextEncoder(models.clip(), ["Cat", "SPORTS_CAR"]).prompts.ids)
