"""Tiny ImageNet's validation images, and spoilt ones, give the demo model's measured rows, stopped or not."""

import json
import os
import random
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from recipes.demo.corruptions import KINDS, corrupt
from recipes.demo.data import load_split
from tpt_fast import TuneConfig, demo
from tpt_fast.clip import Clip
from tpt_fast.evaluation.report import report
from tpt_fast.evaluation.run import evaluate

ROOT = Path(__file__).resolve().parent.parent
DATA = Path(os.environ.get("TPT_FAST_DEMO_DATA", ROOT.parent / "shared" / "data"))
ROWS = ROOT / "benchmarks" / "results" / "demo_accuracy.json"
STOPS = 3


@dataclass
class Spoilt:
    name: str
    pixels: np.ndarray
    labels: np.ndarray
    classnames: tuple[str, ...] = demo.CLASSNAMES
    templates: tuple[str, ...] = ("a photo of a {}.",)
    notes: tuple[str, ...] = ()

    @property
    def digest(self) -> str:
        return self.name

    def __len__(self) -> int:
        return len(self.labels)

    def id(self, i: int) -> str:
        return f"{i:05}"

    def label(self, i: int) -> int:
        return int(self.labels[i])

    def image(self, i: int) -> np.ndarray:
        return self.pixels[i]


class Stop(Exception):
    pass


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=pytest.mark.slow if kind == "clean" else pytest.mark.evidence) for kind in KINDS]
)
def test_the_demo_models_own_table(kind, tmp_path):
    try:
        validation = load_split(DATA, train=False)
    except FileNotFoundError:
        pytest.skip(f"no Tiny ImageNet at {DATA}; TPT_FAST_DEMO_DATA may name another folder")
    zero_shot = next(row["zero_shot"] for row in json.loads(ROWS.read_text("utf-8")) if row["kind"] == kind)
    chosen = np.random.default_rng(0).permutation(len(validation.labels))[:2000]
    pixels = corrupt(validation.images.numpy()[chosen], kind, 3, 0)
    images = Spoilt(kind, pixels, validation.labels.numpy()[chosen])
    loaded = demo.load()
    clip = Clip(loaded.model, tokenizer=loaded.tokenizer)
    options = {"out": tmp_path, "every": 0.5, "features": tmp_path / "features"}
    config = TuneConfig(method="zero_shot", n_views=2)
    draw = random.Random(kind)

    for _ in range(STOPS):
        left = draw.randrange(1, 500)

        def seen(progress, left=left):
            if progress.done == left:
                raise Stop

        with pytest.raises(Stop):
            evaluate(images, clip, config, seen=seen, **options)
    evaluate(images, clip, config, **options)
    (found,) = report(tmp_path)
    assert found.methods[0].images == 2000
    # Answers within a rounding of one another may be either on another machine: one image of 2,000 is 0.05.
    assert 100 * found.methods[0].mean["top1"] == pytest.approx(zero_shot, abs=0.11)
