"""Images whose features were kept: one by one, in a batch, and with the Jacobian in place of the first backward pass.

ViT-B/16's text tower with random weights. A Jacobian is 512 backward passes with the classes' prefixes apart, of which
three are timed; the one that the images are timed with holds other numbers, which cost the same.
"""

from __future__ import annotations

from statistics import median

import open_clip
import torch
from timing import DEVICE

from tpt_fast import TextEncoder, TuneConfig, Tuner
from tpt_fast.bench.rates import synchronize
from tpt_fast.bench.rows import digits, row
from tpt_fast.bench.turns import take_turns
from tpt_fast.clip import Clip
from tpt_fast.text.jacobian import Jacobian

CLASSES, BATCH, WIDE, IMAGES = 1000, 8, 512, 10_000


def test_features(keep):
    torch.manual_seed(0)
    clip = Clip(open_clip.create_model("ViT-B-16").eval().to(DEVICE))
    names = open_clip.IMAGENET_CLASSNAMES[:CLASSES]
    features = torch.nn.functional.normalize(torch.randn(BATCH, 64, WIDE, device=DEVICE), dim=-1)
    plain, quick = (Tuner(clip, names, TuneConfig(cuda_graphs=False)) for _ in range(2))
    text = quick.classes.text
    first, _ = text.initial()
    rows = torch.randn(*first.shape, text.ctx_init.numel(), device=DEVICE) * 1e-3
    text._initial = first, Jacobian(rows, text.ctx_init.shape)

    each = text.ctx_init.expand(len(first), *text.ctx_init.shape).contiguous()
    apart = TextEncoder(clip.text, text.classnames, ctx=each)
    _, tape = apart.initial()
    grad = torch.randn_like(first)

    def images(tuner, together):
        def run():
            for some in features.split(BATCH if together else 1):
                tuner.tune_features(some)
            synchronize(DEVICE)

        return run

    def one_pass():
        apart.backward(tape, grad)
        synchronize(DEVICE)

    runs = {
        "one by one": images(plain, False),
        "in a batch": images(plain, True),
        "in a batch, Jacobian": images(quick, True),
        "a pass for the Jacobian": one_pass,
    }
    taken = take_turns(runs, 3, 120)
    each_image = {name: [seconds / BATCH for seconds in taken[name]] for name in list(runs)[:3]}
    making = WIDE * median(taken["a pass for the Jacobian"])
    before, after = median(each_image["in a batch"]), median(each_image["in a batch, Jacobian"])
    case = f"ViT-B-16, {CLASSES} classes, an image"
    for name, seconds in each_image.items():
        keep([row("features", f"{case}, {name}", "tpt_fast", seconds)])
    whole = digits(IMAGES * before / (IMAGES * after + making))
    even = digits(making / (before - after))
    keep([row("features", f"Jacobian of {case.partition(',')[0]}, {CLASSES} classes", "tpt_fast", [making],
              times_as_fast_with_10000_images=whole, pays_from_images=even)])  # fmt: skip
    print({name: median(seconds) for name, seconds in each_image.items()}, making, whole, even)
