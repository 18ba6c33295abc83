"""One whole image: the Tuner against the published algorithm in plain PyTorch, from a photograph and from given views.

Weights are random, for speed does not depend on them. Both draw the same views, and the answers are compared.
``--all-models`` runs the other towers and numbers of classes too; the published algorithm is left out where its graph
does not fit in memory. On a GPU both also run in fp16, the published one by autocast. The floor is the time of the
matrix products that the Tuner's way leaves to do, as torch counts them (without attention's), at the matrix rate
measured beside each case.

``python benchmarks/bench_tune.py PICTURE`` draws where the time goes, from the rows that ``--rows`` has kept.
"""

import math
import sys
from contextlib import contextmanager
from functools import lru_cache
from time import perf_counter

import open_clip
import pytest
import rows
import torch
from open_clip.zero_shot_metadata import IMAGENET_CLASSNAMES
from PIL import Image
from timing import DEVICE, matrix_rate, synchronize
from torch.utils.flop_counter import FlopCounterMode

from tpt_fast import TuneConfig, Tuner
from tpt_fast.batch import Stages
from tpt_fast.demo import PHOTO_FOLDER
from tpt_fast.reference.tpt import pil_views, tpt
from tpt_fast.text.memory import free_bytes
from tpt_fast.tuner import Prepared

DEFAULT = [("ViT-B-16", classes) for classes in ((10, 1000) if DEVICE.type == "cuda" else (200,))]
CASES = [(name, classes) for name in ("RN50", "ViT-B-32", "ViT-B-16", "ViT-L-14") for classes in (10, 200, 1000)]
TYPES = {"fp32": torch.float32, "fp16": torch.float16}
PRECISIONS = ["fp32", "fp16"] if DEVICE.type == "cuda" else ["fp32"]
IMAGES = 4  # of a batch or a stream
SECONDS = 240  # the calls of a case that are timed take about so long together, where one does not take longer
PHOTO = Image.open(PHOTO_FOLDER / "temple.jpg").convert("RGB").resize((500, 375))


@lru_cache(maxsize=1)
def prepared(name, classes):
    """Model, class names, tokenizer, Tuner and the photograph's views; of the last case only."""
    torch.manual_seed(0)
    model = open_clip.create_model(name).eval().requires_grad_(False).to(DEVICE)
    model.logit_scale.fill_(math.log(100))  # where training ends
    names, tokenizer = IMAGENET_CLASSNAMES[:classes], open_clip.get_tokenizer(name)
    tuner = tuner_of(model, names, "fp32")
    return model, names, tokenizer, tuner, pil_views(PHOTO, 64, *tuner.preprocessing).to(DEVICE)


def tuner_of(model, names, precision, **options):
    # With fp16 strict_official would be the published precision, which is what the other backend times.
    return Tuner(model, names, TuneConfig(strict_official=precision == "fp32", precision=precision, **options))


class Waiting(Stages):
    """Stages that end when the device has done their work."""

    @contextmanager
    def __call__(self, name):
        with super().__call__(name):
            yield
            synchronize()


def stages_of(model, names, precision, image):
    """Each stage's part of one image's time, run eagerly, and the operations of its matrix products."""
    eager = tuner_of(model, names, precision, cuda_graphs=False)
    prepared = [eager._prepare(image) if image is PHOTO else Prepared(image, {})]
    with FlopCounterMode(display=False) as counted:
        eager._tune(prepared, False)
    taken = Waiting()
    for _ in range(3 if DEVICE.type == "cuda" else 1):  # a CPU's whole image is long
        if image is PHOTO:
            with taken("load and views"):
                prepared = [eager._prepare(image)]
        with torch.no_grad():
            eager._loop(prepared[0].views[None], eager._classes, taken)
    total = sum(taken.seconds.values())
    return {stage: seconds / total for stage, seconds in taken.seconds.items()}, counted.get_total_flops()


def timed(benchmark, run, rounds):
    """Time up to ``rounds`` calls of ``run``, after one that tells how far memory rises above where it was."""
    peak, begun = rows.Peak(), perf_counter()
    peak.of(run)
    benchmark.extra_info["peak_mb"] = round(peak.bytes / 1e6)
    fit = int(SECONDS / (perf_counter() - begun))
    return benchmark.pedantic(run, rounds=max(1, min(rounds, fit)))


def graph_bytes(model, classes):
    """About what autograd keeps of every token of every prompt: 20 rows of the tower's width a block."""
    depth, width = len(model.transformer.resblocks), model.token_embedding.weight.shape[1]
    return 4 * 20 * classes * model.context_length * depth * width


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("backend", ["tpt_fast", "published"])
@pytest.mark.parametrize("start", ["a photograph", "given views"])
@pytest.mark.parametrize(("name", "classes"), CASES)
def test_tune(benchmark, request, name, classes, start, backend, precision):
    if (name, classes) not in DEFAULT and not request.config.getoption("--all-models"):
        pytest.skip("with --all-models")
    model, names, tokenizer, tuner, views = prepared(name, classes)
    if precision != "fp32":
        tuner = tuner_of(model, names, precision)
    image = PHOTO if start == "a photograph" else views

    def ours():
        torch.manual_seed(0)
        return tuner(image) if image is PHOTO else tuner.tune_views(image)

    def published():
        torch.manual_seed(0)
        with torch.autocast(DEVICE.type, torch.float16, enabled=precision == "fp16"):
            return tpt(model, image, names, tokenizer)

    case = f"{name}, {classes} classes, {start}" + (f", {precision}" if precision != "fp32" else "")
    benchmark.extra_info.update(op="tune", case=case, backend=backend)
    if backend == "tpt_fast":
        if DEVICE.type == "cuda":  # the second call of a shape captures its graph
            ours()
        rate = matrix_rate(dtype=TYPES[precision])
        timed(benchmark, ours, 7)
        rate = max(rate, matrix_rate(dtype=TYPES[precision]))
        shares, flops = stages_of(model, names, precision, image)
        benchmark.extra_info.update(
            shares={stage: round(share, 4) for stage, share in shares.items()},
            gflops=round(flops / 1e9),
            matrix_gflops=round(rate / 1e9),
            held_mb=round(tuner.memory().own / 1e6),
        )
        if benchmark.stats:
            benchmark.extra_info["over_floor"] = round(benchmark.stats.stats.median * rate / flops, 3)
        return
    if graph_bytes(model, classes) > 0.8 * free_bytes(views.device):
        pytest.skip(f"the published algorithm needs about {graph_bytes(model, classes) / 1e9:.0f} GB")
    want, got = timed(benchmark, published, 3), ours()
    if precision == "fp32":  # autocast rounds elsewhere
        assert got.selected.tolist() == want.selected.tolist()
    for field in ("logits", "zero_shot_logits", "entropies", "grad") if precision == "fp32" else ("zero_shot_logits",):
        a, b = getattr(got, field), getattr(want, field).float().cpu()
        bound = 1e-3 if precision == "fp32" else 2e-2
        torch.testing.assert_close(a, b, rtol=0, atol=bound * b.abs().max().item(), msg=field)


@pytest.mark.parametrize("mode", ["batch", "stream"])
@pytest.mark.parametrize(("name", "classes"), CASES)
def test_many(benchmark, request, name, classes, mode):
    """Images a second; the photographs differ in size."""
    if (name, classes) not in DEFAULT and not request.config.getoption("--all-models"):
        pytest.skip("with --all-models")
    tuner = prepared(name, classes)[3]
    photos = [PHOTO.resize((500 - 20 * i, 375)) for i in range(IMAGES)]
    run = tuner.tune_batch if mode == "batch" else lambda images: list(tuner.map(images))
    case = f"{name}, {classes} classes, {mode} of {IMAGES}"
    benchmark.extra_info.update(op="tune", case=case, backend="tpt_fast")
    results = timed(benchmark, lambda: run(photos), 3)
    assert [result.status for result in results] == ["tuned"] * IMAGES
    if benchmark.stats:
        benchmark.extra_info["images_per_s"] = round(IMAGES / benchmark.stats.stats.median, 3)


def draw(kept, path):
    """A bar a case: the seconds of each stage, and beside it what the published algorithm took."""
    import matplotlib.pyplot as plt

    ours = {row["case"]: row for row in kept if "shares" in row}
    if not ours:
        raise SystemExit("no rows: run `pytest benchmarks/bench_tune.py --rows` first")
    theirs = {row["case"]: row["median"] for row in kept if row["backend"] == "published"}
    figure, axes = plt.subplots(figsize=(9, 1.2 + 0.7 * len(ours)), layout="constrained")
    stages = list(dict.fromkeys(stage for row in ours.values() for stage in row["shares"]))
    left = dict.fromkeys(ours, 0.0)
    for stage in stages:
        widths = [row["shares"].get(stage, 0) * row["median"] for row in ours.values()]
        axes.barh([y - 0.2 for y in range(len(ours))], widths, 0.38, list(left.values()), label=stage)
        left = {case: begin + width for (case, begin), width in zip(left.items(), widths, strict=True)}
    slow = [theirs.get(case, 0) for case in ours]
    axes.barh([y + 0.2 for y in range(len(ours))], slow, 0.38, color="lightgrey", label="published")
    axes.set(yticks=range(len(ours)), yticklabels=ours, xlabel="seconds an image")
    axes.invert_yaxis()
    figure.legend(loc="outside right upper", fontsize="small")
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit(f"usage: python {sys.argv[0]} PICTURE")
    draw(rows.read("tune"), sys.argv[1])
