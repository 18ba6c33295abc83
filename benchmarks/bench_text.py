"""The text tower of ViT-B/16: packed, against the published way, which runs all 77 tokens of every prompt.

"first image" is forward, backward, forward; "each image" is what later images cost, backward from the activations of
the first forward and one forward, against the published loop, which runs all three for every image. ``--text-memory``
also measures what a thousand and ten thousand classes take in memory, each in a process of its own.
"""

import json
import subprocess
import sys
from functools import lru_cache

import open_clip
import pytest
import rows
import torch
from open_clip.zero_shot_metadata import IMAGENET_CLASSNAMES

from tpt_fast import TextEncoder
from tpt_fast.reference.tpt import context_in_place

TOWER, CLASSES = "ViT-B-16", 200


@lru_cache
def prepared():
    """Encoder, a function of a context that gives the published way's features, and a gradient of features."""
    torch.manual_seed(0)
    model = open_clip.create_model(TOWER).eval().requires_grad_(False)
    names, tokenizer = IMAGENET_CLASSNAMES[:CLASSES], open_clip.get_tokenizer(TOWER)
    ids = tokenizer([f"a photo of a {name}." for name in names])
    encoder = TextEncoder(model, names, tokenizer=tokenizer)
    grad = torch.randn(CLASSES, encoder.initial()[0].shape[1])

    def features(ctx):
        with context_in_place(model.token_embedding, ctx):
            return model.encode_text(ids, normalize=True)

    return encoder, features, grad


def moved(ctx, grad):
    """Something like a step of the optimizer."""
    return ctx - 5e-3 * grad.sign()


def ours_first():
    encoder, _, grad = prepared()
    features, tape = encoder.forward(encoder.ctx_init, keep=True)
    grad_ctx = encoder.backward(tape, grad)
    return features, grad_ctx, encoder.forward(moved(encoder.ctx_init, grad_ctx))[0]


def ours_each():
    encoder, _, grad = prepared()
    features, tape = encoder.initial()
    grad_ctx = encoder.backward(tape, grad)
    return features, grad_ctx, encoder.forward(moved(encoder.ctx_init, grad_ctx))[0]


def published():
    encoder, features_of, grad = prepared()
    ctx = encoder.ctx_init.clone().requires_grad_()
    features = features_of(ctx)
    (grad_ctx,) = torch.autograd.grad(features, ctx, grad)
    with torch.no_grad():
        return features.detach(), grad_ctx, features_of(moved(ctx, grad_ctx))


@pytest.mark.parametrize("case", ["first image", "each image"])
@pytest.mark.parametrize("backend", ["tpt_fast", "published"])
def test_text(benchmark, backend, case):
    benchmark.extra_info.update(op="text", case=f"{TOWER}, {CLASSES} classes, {case}", backend=backend)
    ours = ours_first if case == "first image" else ours_each
    if backend == "tpt_fast":
        benchmark.pedantic(ours, rounds=9, warmup_rounds=2)
        return
    want, got = benchmark.pedantic(published, rounds=2), ours()
    for name, a, b in zip(("features", "gradient", "features after"), got, want, strict=True):
        # A step is a sign of the gradient: where that is rounding, features after it differ more than before it.
        bound = 1e-3 if name == "features after" else 2e-5
        torch.testing.assert_close(a, b, rtol=0, atol=bound * b.abs().max().item(), msg=name)


MEMORY = """
import json, resource, sys, torch, open_clip
from tpt_fast import TextEncoder
torch.manual_seed(0)
model = open_clip.create_model(sys.argv[1]).eval().requires_grad_(False)
tokenizer = open_clip.get_tokenizer(sys.argv[1])
words = open_clip.zero_shot_metadata.IMAGENET_CLASSNAMES
names = [words[i % 1000] + (f" {i // 1000}" if i >= 1000 else "") for i in range(int(sys.argv[2]))]
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
before = peak()
encoder = TextEncoder(model, names, tokenizer=tokenizer)
features, tape = encoder.initial()
grad = encoder.backward(tape, torch.randn_like(features))
encoder.forward(encoder.ctx_init - 5e-3 * grad.sign())
print(json.dumps({"bytes": peak() - before, **encoder.describe()}))
"""


@pytest.mark.parametrize(("classes", "limit"), [(1000, 1.5e9), (10_000, 6e9)])
def test_memory(request, classes, limit):
    if not request.config.getoption("--text-memory"):
        pytest.skip("with --text-memory")
    result = subprocess.run([sys.executable, "-c", MEMORY, TOWER, str(classes)], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    measured = json.loads(result.stdout)
    print(measured)
    if request.config.getoption("--rows"):
        case = {"op": "text_memory", "case": f"{TOWER}, {classes} classes"}
        rows.write("text_memory", [{**case, **measured, **rows.machine()}])
    assert measured["bytes"] < limit
