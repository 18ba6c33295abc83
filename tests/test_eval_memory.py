"""A million images: nothing of a run or its report is read whole."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from tpt_fast import TuneConfig, Tuner, demo
from tpt_fast.clip import Clip
from tpt_fast.evaluation import rows
from tpt_fast.evaluation.report import report
from tpt_fast.evaluation.run import evaluate

MILLION = 1_000_000


@dataclass
class Names:
    """Images that have names and nothing else."""

    count: int
    name: str = "names"
    classnames: tuple[str, ...] = demo.CLASSNAMES[:10]
    templates: tuple[str, ...] = ("a photo of a {}.",)
    notes: tuple[str, ...] = ()
    digest: str = "0"

    def __len__(self) -> int:
        return self.count

    def id(self, i: int) -> str:
        return f"folder_{i % 1000}/image_{i:08}.jpg"

    def label(self, i: int) -> int:
        return i % 10

    def image(self, i: int) -> torch.Tensor:
        return PIXELS


PIXELS = torch.zeros(8, 8, 3, dtype=torch.uint8)


def own_bytes() -> int:
    """Memory that is this process's alone: libraries that are mapped from files do not count, nor files read so."""
    text = Path("/proc/self/smaps_rollup").read_text()
    return 1024 * int(next(line.split()[1] for line in text.splitlines() if line.startswith("Anonymous:")))


@pytest.mark.evidence
@pytest.mark.parametrize("images", [MILLION])
def test_a_million_rows_take_under_500_mb(images, tmp_path, monkeypatch):
    loaded = demo.load()
    clip = Clip(loaded.model, tokenizer=loaded.tokenizer)
    tuner = Tuner(clip, Names(1).classnames, TuneConfig(method="zero", n_views=4))
    prepared = tuner.prepare(PIXELS)
    features = tuner.encode(prepared)
    result = tuner.tune_features(features)
    monkeypatch.setattr(Tuner, "prepare", lambda *_, **__: prepared)
    monkeypatch.setattr(Tuner, "encode", lambda *_: features)
    monkeypatch.setattr(Tuner, "tune_features", lambda *_: result)
    before, most = own_bytes(), 0

    def seen(progress):
        nonlocal most
        if progress.done % 5000 == 0:
            most = max(most, own_bytes())

    folder = evaluate(Names(images), clip, TuneConfig(method="zero", n_views=4), out=tmp_path, seen=seen)
    found = rows.read(folder / "rows", "zero", 0)
    assert np.array_equal(found.image, np.arange(images))
    del found
    most = max(most, own_bytes())
    (of_set,) = report(tmp_path)
    most = max(most, own_bytes())
    assert rows.write_merged(folder / "rows", tmp_path / "rows.parquet") >= images
    most = max(most, own_bytes())
    assert of_set.methods[0].images == images
    print(f"{images:,} images: {(most - before) / 1e6:.0f} MB")
    assert most - before < 500e6
