"""The image tower against open_clip's eager ``encode_image``, and its share of the matrix rate around each round."""

from copy import deepcopy
from functools import lru_cache
from itertools import pairwise
from statistics import median

import open_clip
import pytest
import torch
from timing import DEVICE, measure

from tpt_fast._machine import cpu_flags
from tpt_fast.bench.rates import matrix_rate
from tpt_fast.vision import ImageEncoder, vit

TOWERS, VIEWS = ("ViT-B-32", "ViT-B-16", "RN50"), 64
BOUNDS = {torch.float32: 1e-5}
if DEVICE.type == "cuda":
    BOUNDS[torch.float16] = 1e-2
elif "avx512bf16" in cpu_flags():  # torch's own products in bfloat16 take minutes on others
    BOUNDS[torch.bfloat16] = 2e-2
SHORT = {torch.float32: "", torch.float16: ", fp16", torch.bfloat16: ", bf16"}


@lru_cache(maxsize=1)
def prepared(tower):
    """A model with random weights, views, and the features of two by the model itself, in float32."""
    torch.manual_seed(0)
    model = open_clip.create_model(tower).eval().to(DEVICE)
    views = torch.randn(VIEWS, 3, 224, 224, device=DEVICE)
    with torch.no_grad():
        return model, views, model.encode_image(views[:2], normalize=True)


def needed_flops(visual, views):
    """Multiplications and additions of the matrix products that the class token's feature needs, or None."""
    if type(visual).__name__ != "VisionTransformer":
        return None
    width, blocks = visual.transformer.width, list(visual.transformer.resblocks)
    length, hidden = visual.positional_embedding.shape[0], blocks[0].mlp.c_fc.out_features
    embed = (length - 1) * visual.conv1.weight.numel()
    whole = length * width * (4 * width + 2 * hidden) + 2 * length**2 * width
    last = 2 * length * width**2 + width * (2 * width + 2 * hidden) + 2 * length * width
    return 2 * views * (embed + (len(blocks) - 1) * whole + last + visual.proj.numel())


@pytest.mark.parametrize("backend", ["tpt_fast", "open_clip", "tpt_fast, fp32"])
@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("tower", TOWERS)
def test_vision(benchmark, backend, tower, dtype):
    case = f"{tower} x {VIEWS}{SHORT[dtype]}"
    if backend == "tpt_fast, fp32":
        if dtype == torch.float32:
            pytest.skip("that is tpt_fast's")
        dtype = torch.float32
    model, views, want = prepared(tower)
    model, views = deepcopy(model).to(dtype), views.to(dtype)
    encoder = ImageEncoder(model, dtype)
    run = torch.no_grad()(lambda v: model.encode_image(v, normalize=True)) if backend == "open_clip" else encoder.encode
    assert (encoder.encode(views[:2]) - want).norm() / want.norm() < BOUNDS[dtype]
    benchmark.extra_info.update(op="vision", case=case, backend=backend)
    rates = []  # before every round and after the last: a shared machine's rate moves between rounds

    def rate():
        rates.append(matrix_rate(DEVICE, dtype))

    measure(benchmark, run, (views,), rounds=5, warmup_rounds=1, before=rate)
    rate()
    flops = needed_flops(model.visual, VIEWS)
    if flops and benchmark.stats:
        around = [max(pair) for pair in pairwise(rates)][-5:]
        shares = [flops / seconds / rate for seconds, rate in zip(benchmark.stats.stats.data, around, strict=True)]
        benchmark.extra_info.update(
            gflops_needed=round(flops / 1e9),
            matrix_gflops=round(median(around) / 1e9),
            share=round(median(shares), 3),
        )


@pytest.mark.skipif(DEVICE.type != "cuda", reason="how many views a GPU's caches hold at once")
@pytest.mark.parametrize("together", [VIEWS, 32, 16])
def test_groups(benchmark, monkeypatch, together):
    model, views, _ = prepared("ViT-B-16")
    encoder, views = ImageEncoder(deepcopy(model).half(), torch.float16), views.half()
    monkeypatch.setattr(vit, "ROWS_ON_A_GPU", together * len(model.visual.positional_embedding))
    backend = "tpt_fast" if together == VIEWS else f"{together} at once"
    benchmark.extra_info.update(op="vision", case=f"ViT-B-16 x {VIEWS}, fp16, in groups", backend=backend)
    measure(benchmark, encoder.encode, (views,), rounds=10, warmup_rounds=2)
