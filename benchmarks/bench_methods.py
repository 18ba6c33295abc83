"""What each method costs beyond the encoding of the 64 views, which is the same for all: ViT-B/16, 200 classes.

A row's share is the method's part of the encoding of the same run; they take turns.
"""

from statistics import median

import open_clip
import torch
from timing import DEVICE

from tpt_fast import TuneConfig, Tuner
from tpt_fast.bench.rates import synchronize
from tpt_fast.bench.rows import digits, row
from tpt_fast.bench.turns import take_turns
from tpt_fast.clip import Clip
from tpt_fast.methods import METHODS, method_class, method_options

VIEWS, CLASSES = 64, 200
TEMPLATES = ["a photo of a {}.", "art of the {}."]  # 80 cost no more once they are encoded
NAMES = [name for name in METHODS if name != "official"]  # which in float32 is tpt
REPEATS, SECONDS = 20, 20


def test_methods(keep):
    torch.manual_seed(0)
    clip = Clip(open_clip.create_model("ViT-B-16").eval().to(DEVICE))
    size, classnames = clip.preprocessing.size, open_clip.IMAGENET_CLASSNAMES[:CLASSES]
    views = torch.randn(1, VIEWS, 3, size, size, device=DEVICE)
    features = torch.nn.functional.normalize(torch.randn(VIEWS, 512, device=DEVICE), dim=-1)

    def encode(views=views):
        with torch.no_grad():
            clip.encode(views)
        synchronize(DEVICE)

    runs = {}
    for method in NAMES:
        few = {"templates": TEMPLATES} if "templates" in method_options(method_class(method)) else {}
        tuner = Tuner(clip, classnames, TuneConfig.of(method=method, **few))
        runs[method] = lambda tuner=tuner: tuner.tune_features(features)
        for _ in range(3 if DEVICE.type == "cuda" else 1):  # the second call captures a graph
            assert runs[method]().status == "tuned"
    encode(views if DEVICE.type == "cuda" else views[:, :2])
    taken = take_turns({**runs, "encoding": encode}, REPEATS, SECONDS)
    shares = {}
    for method in NAMES:
        case = f"{method}, ViT-B-16 x {VIEWS}, {CLASSES} classes"
        shares[method] = median(taken[method]) / median(taken["encoding"])
        keep([row("methods", case, "tpt_fast", taken[method], share_of_encoding=digits(shares[method]))])
        keep([row("methods", case, "encoding the views", taken["encoding"])])
    print({method: f"{1e3 * median(taken[method]):.2f} ms, {share:.2%}" for method, share in shares.items()})
