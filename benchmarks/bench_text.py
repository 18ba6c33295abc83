"""The text tower of ViT-B/16 on the CPU: packed, against the published way, which runs all 77 tokens of every prompt.

"first image" is forward, backward, forward; "each image" is what later images cost, backward from the activations of
the first forward and one forward, against the published loop, which runs all three for every image. ``--text-sizes``
also measures time and peak memory from 100 to 10,000 classes, each in a process of its own.

``python benchmarks/bench_text.py PICTURE`` draws the latter, from the rows that ``--rows`` has kept.
"""

import json
import subprocess
import sys
import time
from functools import lru_cache
from pathlib import Path

import kept
import open_clip
import pytest
import torch
from open_clip.zero_shot_metadata import IMAGENET_CLASSNAMES
from packed import TOWER

from tpt_fast import TextEncoder
from tpt_fast.bench import rows
from tpt_fast.bench.peak import Peak
from tpt_fast.methods.published import context_in_place

NAMES = IMAGENET_CLASSNAMES[::5]
CLASSES = len(NAMES)
SIZES = {100: 1500, 300: 1500, 1000: 1500, 3000: 6000, 10_000: 6000}  # classes, and megabytes they may take


@lru_cache
def prepared():
    """Encoder, a function of a context that gives the published way's features, and a gradient of features."""
    torch.manual_seed(0)
    model = open_clip.create_model(TOWER).eval().requires_grad_(False)
    tokenizer = open_clip.get_tokenizer(TOWER)
    ids = tokenizer([f"a photo of a {name}." for name in NAMES])
    encoder = TextEncoder(model, NAMES, tokenizer=tokenizer)
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


def measure(classes, rounds):
    """Seconds of one image's share and the peak above the model, with ``classes`` names, in a process of its own."""
    torch.manual_seed(0)
    model = open_clip.create_model(TOWER).eval().requires_grad_(False)
    names = [NAMES[i % CLASSES] + (f" {i // CLASSES}" if i >= CLASSES else "") for i in range(classes)]
    peak, taken = Peak(torch.device("cpu")), []
    encoder = peak.of(lambda: TextEncoder(model, names, tokenizer=open_clip.get_tokenizer(TOWER)))
    features, tape = peak.of(encoder.initial)
    grad = torch.randn_like(features)

    def image():
        return encoder.forward(moved(encoder.ctx_init, encoder.backward(tape, grad)))

    for _ in range(rounds + 1):
        started = time.perf_counter()
        peak.of(image)
        taken.append(time.perf_counter() - started)
    return {"seconds": taken[1:], "peak_mb": round(peak.bytes / 1e6), **encoder.describe()}


@pytest.mark.parametrize(("classes", "rounds", "limit"), [(n, max(2, 3000 // n), SIZES[n]) for n in SIZES])
def test_sizes(request, classes, rounds, limit):
    if not request.config.getoption("--text-sizes"):
        pytest.skip("with --text-sizes")
    script = f"import json, bench_text; print(json.dumps(bench_text.measure({classes}, {rounds})))"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=Path(__file__).parent)
    assert result.returncode == 0, result.stderr
    measured = json.loads(result.stdout.splitlines()[-1])
    row = rows.row("text_sizes", f"{TOWER}, {classes} classes", "tpt_fast", measured.pop("seconds"), **measured)
    print(row)
    if request.config.getoption("--rows"):
        rows.write(kept.path("text_sizes"), [row])
    assert measured["peak_mb"] < limit


def draw(found, path):
    """Seconds and memory over tokens, with the line that the smallest size predicts."""
    import matplotlib.pyplot as plt

    found = sorted(found, key=lambda row: row["tokens"])
    tokens, seconds = ([row[name] for row in found] for name in ("tokens", "median"))
    figure, (above, below) = plt.subplots(2, 1, figsize=(7, 6), sharex=True, layout="constrained")
    above.loglog(tokens, seconds, "o-", label="measured")
    above.loglog(tokens, [seconds[0] * n / tokens[0] for n in tokens], "--", color="grey", label="linear")
    above.set(ylabel="seconds an image", title=f"{TOWER}'s text tower, backward and forward, {found[0]['cpu']}")
    above.legend(loc="lower right")
    above.margins(x=0.15)
    below.semilogx(tokens, [row["peak_mb"] / 1e3 for row in found], "o-")
    below.set(xlabel="packed tokens", ylabel="peak above the model, GB", ylim=(0, None))
    for row in found:
        above.annotate(f"{row['classes']:,} classes ", (row["tokens"], row["median"]), ha="right", va="bottom")
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit(f"usage: python {sys.argv[0]} PICTURE")
    draw(rows.read(kept.path("text_sizes")), sys.argv[1])
