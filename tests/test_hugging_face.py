"""Text towers of Hugging Face, as open_clip wraps them; small ones, with random weights."""

import bounds
import models
import open_clip.hf_model
import pytest
import torch
import transformers
from torch.nn.functional import normalize

from tpt_fast import TextEncoder
from tpt_fast.methods.published import context_in_place

pytestmark = pytest.mark.numerics

NAMES = ("cat", "golden retriever dog", "ox")
COMMON = {"vocab_size": 3000, "pad_token_id": 1}
SMALL = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 128}
NLLB = {f"{side}_{what}": n for side in ("encoder", "decoder") for what, n in
        (("layers", 2), ("attention_heads", 2), ("ffn_dim", 128))}  # fmt: skip
CASES = {
    "roberta": (transformers.RobertaConfig(**COMMON, **SMALL, max_position_embeddings=130), "mean_pooler"),
    "xlm-roberta": (transformers.XLMRobertaConfig(**COMMON, **SMALL, max_position_embeddings=130), "cls_pooler"),
    "bert": (transformers.BertConfig(**COMMON, **SMALL, max_position_embeddings=128), "cls_last_hidden_state_pooler"),
    "mt5": (transformers.MT5Config(**COMMON, d_model=64, d_kv=32, d_ff=128, num_layers=2, num_heads=2), "mean_pooler"),
    "nllb": (transformers.M2M100Config(**COMMON, **NLLB, d_model=64, scale_embedding=True), "cls_pooler"),
}


def tokenizer(texts, context_length=77):
    ids = torch.full((len(texts), context_length), COMMON["pad_token_id"])
    for row, text in zip(ids, texts, strict=True):
        words = [5, *(10 + sum(map(ord, word)) for word in text.replace(".", " .").split()), 2]
        row[: len(words)] = torch.tensor(words)
    return ids


@pytest.mark.parametrize("case", CASES)
def test_against_the_model(monkeypatch, case):
    config, pooler = CASES[case]
    monkeypatch.setattr(open_clip.hf_model.AutoConfig, "from_pretrained", lambda *_a, **_k: config)
    text = {"hf_model_name": case, "hf_model_pretrained": False, "hf_proj_type": "linear", "hf_pooler_type": pooler}
    model = models.clip("CustomTextCLIP", seed=0, vision={"layers": 1, "width": 32, "patch_size": 16}, text=text)
    for p in model.text.parameters():
        if p.ndim > 1:
            torch.nn.init.normal_(p, std=0.1)

    encoder = TextEncoder(model, NAMES, tokenizer=tokenizer)
    assert encoder.engine == "module"
    assert encoder.describe()["tokens"] == 3 * 10  # the longest prompt, not the model's context length
    ids = tokenizer([f"a photo of a {name}." for name in NAMES])
    table = model.text.transformer.get_input_embeddings()
    leaf = table(ids[0, 1:5]).detach().requires_grad_()
    with context_in_place(table, leaf):
        want = normalize(model.encode_text(ids), dim=-1)
    assert torch.equal(encoder.ctx_init, leaf.detach())
    features, tape = encoder.initial()
    allowed = 2 * bounds.rounding(2 * bounds.chain(model.text))  # both are off by their own rounding
    assert bounds.distance(features, want) < allowed
    grad = torch.randn(want.shape)
    (slope,) = torch.autograd.grad(want, leaf, grad)
    assert bounds.distance(encoder.backward(tape, grad), slope) < allowed
