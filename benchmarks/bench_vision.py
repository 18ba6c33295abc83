"""The image tower against open_clip's eager ``encode_image``, and its share of the matrix rate of the same run."""

import open_clip
import pytest
import torch
from timing import DEVICE, measure

from tpt_fast.bench.rates import matrix_rate
from tpt_fast.vision import ImageEncoder

TOWERS = {"ViT-B-32": 64, "ViT-B-16": 64, "RN50": 64}


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


@pytest.mark.parametrize("tower", TOWERS)
@pytest.mark.parametrize("backend", ["tpt_fast", "open_clip"])
def test_vision(benchmark, backend, tower):
    torch.manual_seed(0)
    model, count = open_clip.create_model(tower).eval().to(DEVICE), TOWERS[tower]
    views = torch.randn(count, 3, 224, 224, device=DEVICE)
    encoder = ImageEncoder(model, torch.float32)
    run = encoder.encode if backend == "tpt_fast" else torch.no_grad()(lambda v: model.encode_image(v, normalize=True))
    with torch.no_grad():
        want = model.encode_image(views[:2], normalize=True)
    assert (encoder.encode(views[:2]) - want).norm() / want.norm() < 1e-5
    benchmark.extra_info.update(op="vision", case=f"{tower} x {count}", backend=backend)
    before = matrix_rate(DEVICE)
    measure(benchmark, run, (views,), rounds=5, warmup_rounds=1)
    rate, flops = max(before, matrix_rate(DEVICE)), needed_flops(model.visual, count)
    if flops and benchmark.stats:
        share = flops / benchmark.stats.stats.median / rate
        benchmark.extra_info.update(
            gflops_needed=round(flops / 1e9), matrix_gflops=round(rate / 1e9), share=round(share, 3)
        )
