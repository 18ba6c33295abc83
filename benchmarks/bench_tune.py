"""One whole image: the Tuner against the published algorithm in plain PyTorch, from a photograph and from given views.

Weights are random, for speed does not depend on them. Both draw the same views, and the answers are compared.
``--all-models`` runs the other towers and numbers of classes too; the published algorithm is left out where its graph
does not fit in memory.
"""

import math
from functools import lru_cache

import open_clip
import pytest
import torch
from open_clip.zero_shot_metadata import IMAGENET_CLASSNAMES
from PIL import Image

from tpt_fast import TuneConfig, Tuner
from tpt_fast.demo import PHOTO_FOLDER
from tpt_fast.reference.tpt import pil_views, tpt
from tpt_fast.text.memory import free_bytes

DEFAULT = ("ViT-B-16", 200)
CASES = [(name, classes) for name in ("RN50", "ViT-B-32", "ViT-B-16", "ViT-L-14") for classes in (10, 200, 1000)]
PHOTO = Image.open(PHOTO_FOLDER / "temple.jpg").convert("RGB").resize((500, 375))


@lru_cache(maxsize=1)
def prepared(name, classes):
    """Model, class names, tokenizer, Tuner and the photograph's views; of the last case only."""
    torch.manual_seed(0)
    model = open_clip.create_model(name).eval().requires_grad_(False)
    model.logit_scale.fill_(math.log(100))  # where training ends
    names, tokenizer = IMAGENET_CLASSNAMES[:classes], open_clip.get_tokenizer(name)
    tuner = Tuner(model, names, TuneConfig(strict_official=True))
    return model, names, tokenizer, tuner, pil_views(PHOTO, 64, *tuner.preprocessing)


def graph_bytes(model, classes):
    """About what autograd keeps of every token of every prompt: 20 rows of the tower's width a block."""
    depth, width = len(model.transformer.resblocks), model.token_embedding.weight.shape[1]
    return 4 * 20 * classes * model.context_length * depth * width


@pytest.mark.parametrize("backend", ["tpt_fast", "published"])
@pytest.mark.parametrize("start", ["a photograph", "given views"])
@pytest.mark.parametrize(("name", "classes"), CASES)
def test_tune(benchmark, request, name, classes, start, backend):
    if (name, classes) != DEFAULT and not request.config.getoption("--all-models"):
        pytest.skip("with --all-models")
    model, names, tokenizer, tuner, views = prepared(name, classes)
    image, results = (PHOTO, []) if start == "a photograph" else (views, [])

    def ours():
        torch.manual_seed(0)
        results.append(tuner(image) if image is PHOTO else tuner.tune_views(image))
        return results[-1]

    def published():
        torch.manual_seed(0)
        return tpt(model, image, names, tokenizer)

    info = {"op": "tune", "case": f"{name}, {classes} classes, {start}", "backend": backend}
    benchmark.extra_info.update(info)
    if backend == "tpt_fast":
        benchmark.pedantic(ours, rounds=7, warmup_rounds=1)
        total = sum(result.timings["total"] for result in results[1:])
        stages = [stage for stage in results[0].timings if stage != "total"]
        shares = {stage: sum(result.timings[stage] for result in results[1:]) / total for stage in stages}
        benchmark.extra_info["shares"] = {stage: round(share, 4) for stage, share in shares.items()}
        return
    if graph_bytes(model, classes) > 0.8 * free_bytes(views.device):
        pytest.skip(f"the published algorithm needs about {graph_bytes(model, classes) / 1e9:.0f} GB")
    want, got = benchmark.pedantic(published, rounds=2), ours()
    assert got.selected.tolist() == want.selected.tolist()
    for field in ("logits", "zero_shot_logits", "entropies", "grad"):
        a, b = getattr(got, field), getattr(want, field)
        torch.testing.assert_close(a, b, rtol=0, atol=1e-3 * b.abs().max().item(), msg=field)
