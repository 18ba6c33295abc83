"""Prompts: what stands where, CoOp checkpoints, and the messages for bad input."""

import open_clip
import pytest
import torch

from tpt_fast.text.prompts import build_prompts

TOKENIZER = open_clip.get_tokenizer("ViT-B-32")
EOT = 49407


def prompts(names, ctx_init="a photo of a", n_ctx=None, tokenizer=TOKENIZER, length=77):
    return build_prompts(names, ctx_init, n_ctx, tokenizer, length)


def test_end_is_the_plain_sentence():
    p = prompts(["tench", "great_white_shark", "tench"])
    sentences = ["a photo of a tench.", "a photo of a great white shark.", "a photo of a tench."]
    assert torch.equal(p.ids, TOKENIZER(sentences))
    assert p.positions.tolist() == [[1, 2, 3, 4]] * 3
    assert (p.ids.argmax(1) + 1 == p.lengths).all()
    assert (p.lead, p.first, p.n_ctx) == (4, 1, 4)
    assert p.classnames == ("tench", "great_white_shark", "tench")


@pytest.mark.parametrize("template", ["a photo [CLS] in the wild", "a_photo_[CLS]_in_the_wild"])
def test_middle_puts_the_words_behind_the_name(template):
    p = prompts(["great white shark", "tench"], template)
    assert torch.equal(p.ids[0], TOKENIZER(["a photo great white shark in the wild."])[0])
    assert p.positions[0].tolist() == [1, 2, 6, 7, 8]
    assert (p.lead, p.n_ctx) == (2, 5)
    name = int(p.lengths[1] - p.lengths[0]) + 3
    assert p.positions[1].tolist() == [1, 2, 3 + name, 4 + name, 5 + name]


def test_front():
    p = prompts(["great white shark"], "[CLS] a photo")
    assert torch.equal(p.ids[0], TOKENIZER(["great white shark a photo."])[0])
    assert p.positions.tolist() == [[4, 5]]
    assert p.lead == 0


def test_mark_at_the_end_changes_nothing():
    assert torch.equal(prompts(["dog"], "a photo of a [CLS]").ids, prompts(["dog"]).ids)


def test_words_of_several_tokens_are_several_vectors():
    p = prompts(["dog"], "a photograph of thylacines")
    assert p.n_ctx == int((TOKENIZER(["a photograph of thylacines"])[0] != 0).sum()) - 2 > 4


@pytest.mark.parametrize(
    ("template", "lead"), [("a photo of a", 16), ("[CLS] so", 0), ("a [CLS] b", 8), ("a [CLS]", 16)]
)
def test_random_context_takes_only_the_place_from_the_words(template, lead):
    p = prompts(["dog"], template, n_ctx=16)
    assert (p.n_ctx, p.lead) == (16, lead)
    assert p.lengths.tolist() == [1 + 16 + 3]


def test_words_with_their_own_number_of_vectors_keep_their_places():
    assert torch.equal(prompts(["dog"], "a photo [CLS] of", n_ctx=3).ids, prompts(["dog"], "a photo [CLS] of").ids)


def test_name_that_just_fits():
    words = " ".join(["x"] * 70)  # SOS, 4, 70, full stop, EOT
    assert prompts([words]).lengths.tolist() == [77]
    with pytest.raises(ValueError, match=r"the prompt of 'x x x.* has 78 tokens .* the model takes 77"):
        prompts(["dog", words + " x"])


def test_any_tokenizer_that_pads():
    def bert_like(texts, context_length=77):
        ids = torch.full((len(texts), context_length), 9)
        for row, text in zip(ids, texts, strict=True):
            words = [101, *(200 + len(w) for w in text.replace(".", " .").split()), 102][:context_length]
            row[: len(words)] = torch.tensor(words)
        return ids

    p = prompts(["great white shark"], "a photo [CLS] now", tokenizer=bert_like, length=20)
    assert p.ids[0, : int(p.lengths[0])].tolist() == [101, 201, 205, 205, 205, 205, 203, 201, 102]
    assert p.positions.tolist() == [[1, 2, 6]]


def padded_by_end(texts, context_length=16):
    """As SigLIP's and Hugging Face's CLIP tokenizers: the end token also pads, and what is cut off keeps it."""
    ids = torch.full((len(texts), context_length), 1)
    for row, text in zip(ids, texts, strict=True):
        words = [100 + ord(w[0]) for w in text.replace(".", " .").split()][: context_length - 1]
        row[: len(words)] = torch.tensor(words)
    return ids


def test_padding_by_the_end_token():
    p = prompts(["sea lion", "cat"], "a photo [CLS] now", tokenizer=padded_by_end, length=16)
    assert p.ids[0, :8].tolist() == [100 + ord(c) for c in "apsln."] + [1, 1]
    assert p.lengths.tolist() == [7, 6]
    assert p.positions.tolist() == [[0, 1, 4], [0, 1, 3]]
    fits = " ".join(["x"] * 10)  # 4, 10, full stop, end
    assert prompts([fits], tokenizer=padded_by_end, length=16).lengths.tolist() == [16]
    with pytest.raises(ValueError, match=r"has 17 tokens .* the model takes 16"):
        prompts([fits + " x"], tokenizer=padded_by_end, length=16)


@pytest.mark.parametrize(
    ("names", "error", "message"),
    [
        ([], ValueError, "classnames: expected at least one name"),
        ("dog", TypeError, "classnames: expected a sequence of strings, got str 'dog'"),
        (7, TypeError, "classnames: expected a sequence of strings, got int"),
        ({"dog", "cat"}, TypeError, "classnames: expected a sequence, got a set, whose order changes .* sort it"),
        (["dog", 3], TypeError, r"classnames\[1\]: expected a string, got int 3"),
        (["dog", " _"], ValueError, r"classnames\[1\]: expected a name, got ' _'"),
    ],
)
def test_bad_names(names, error, message):
    with pytest.raises(error, match=message):
        prompts(names)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"ctx_init": "[CLS]"}, ValueError, "ctx_init: expected at least one word"),
        ({"ctx_init": "a [CLS] b [CLS]"}, ValueError, r"ctx_init: expected \[CLS\] at most once"),
        ({"ctx_init": "a photo of a {}."}, ValueError, r"got the template 'a photo of a {}.'; write 'a photo of a'"),
        ({"ctx_init": "a {c} in the wild."}, ValueError, r"write 'a \[CLS\] in the wild'"),
        ({"ctx_init": 4}, TypeError, "ctx_init: expected a string, got int 4"),
        ({"n_ctx": 0}, ValueError, "n_ctx: expected 1 to 74 .* got 0"),
        ({"n_ctx": 75}, ValueError, "n_ctx: expected 1 to 74 .* got 75"),
        ({"n_ctx": 4.0}, TypeError, "n_ctx: expected an int, got float"),
        ({"tokenizer": lambda texts: texts}, TypeError, "tokenizer: expected it to return a tensor"),
        ({"tokenizer": lambda texts: torch.ones(len(texts), 5)}, ValueError, "tokenizer: expected rows of at least 77"),
    ],
)
def test_bad_options(options, error, message):
    with pytest.raises(error, match=message):
        prompts(["dog"], **options)
