"""Properties on random inputs, in short; ``python tests/fuzz.py`` looks for longer. Views: test_views.py."""

import os
import pickle
import tempfile
from contextlib import suppress
from functools import cache
from io import BytesIO
from pathlib import Path

import models
import numpy as np
import pytest
import test_objective
import test_text
import test_views
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image

from tpt_fast import TuneConfig, Tuner
from tpt_fast.prompting.coop import load_ctx

pytestmark = pytest.mark.numerics

LOGITS = st.one_of(
    st.floats(-100, 100, width=32),
    st.sampled_from([0.0, 1.0, -1.0, 88.0, 1e-30, 3e38, -3e38, np.inf, -np.inf, np.nan]),
)
SHAPES = st.tuples(st.integers(1, 12), st.integers(1, 40))


@given(SHAPES.flatmap(lambda shape: hnp.arrays(np.float32, shape, elements=LOGITS)), st.integers(1, 12))
def test_an_objective_with_ties_infinities_and_nan(logits, kept):
    test_objective.assert_matches(torch.from_numpy(logits), min(kept, len(logits)))


WORDS = st.lists(
    st.sampled_from(["cat", "great", "white", "shark", "x", "seventeen", "of", "ox"]), min_size=1, max_size=6
)


@settings(max_examples=20)
@given(
    layers=st.integers(1, 3),
    heads=st.integers(1, 3),
    head_width=st.sampled_from([4, 8, 10, 16]),
    context_length=st.integers(24, 77),
    quick_gelu=st.booleans(),
    template=st.sampled_from(["a photo of a", "[CLS] of a thing", "a photo [CLS] in the wild", "one [CLS]"]),
    names=st.lists(WORDS.map(" ".join), min_size=1, max_size=12),
    seed=st.integers(0, 2**31),
)
def test_a_text_tower_of_any_kind(layers, heads, head_width, context_length, quick_gelu, template, names, seed):
    sizes = {"layers": layers, "heads": heads, "width": heads * head_width, "context_length": context_length}
    model = test_text.make(quick_gelu=quick_gelu, seed=seed, **sizes)
    error = test_text.compare(model, names, torch.float64, ctx_init=template)
    assert error < test_text.allowed(model, torch.float64)


@cache
def tuner() -> Tuner:
    return Tuner(models.clip(vision={"layers": 1}, text={"layers": 1}), ["cat", "dog"], TuneConfig(n_views=4, rho=0.5))


@cache
def picture(kind: str) -> bytes:
    file = BytesIO()
    pixels = np.random.default_rng(0).integers(0, 256, (19, 23, 3), dtype=np.uint8)
    Image.fromarray(pixels).convert("P" if kind == "GIF" else "RGB").save(file, kind)
    return file.getvalue()


CHANGES = st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), min_size=1, max_size=8)


@settings(max_examples=60)
@given(st.sampled_from(["PNG", "JPEG", "GIF", "BMP", "WEBP", "TIFF"]), CHANGES, st.floats(0.2, 1))
def test_a_damaged_image_file_never_ends_a_run(kind, changes, length):
    content = bytearray(picture(kind))
    for where, value in changes:
        content[int(where * len(content))] = value
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"image.{kind.lower()}"
        path.write_bytes(content[: int(length * len(content))])
        results = list(tuner().map([path, torch.zeros(9, 9, 3, dtype=torch.uint8)]))
    assert [result.status in ("tuned", "skipped", "failed") for result in results] == [True, True]
    assert results[1].status != "failed"


class Payload:
    """What a pickle runs when it is loaded, if it is loaded without care: something that leaves a file."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


PLACES = {
    "root": lambda bad: bad,
    "state_dict": lambda bad: {"state_dict": bad},
    "ctx": lambda bad: {"state_dict": {"ctx": bad}},
    "beside": lambda bad: {"state_dict": {"ctx": torch.zeros(4, 64)}, "scheduler": bad},
    "list": lambda bad: [torch.zeros(4, 64), {"optimizer": {"state": [bad]}}],
}


@settings(max_examples=40)
@given(
    st.sampled_from(["os.system", "eval", "exec", "open", "Path.touch", "os.mkdir"]),
    st.sampled_from(sorted(PLACES)),
    st.booleans(),
)
def test_a_checkpoint_runs_nothing(function, place, zipped):
    with tempfile.TemporaryDirectory() as folder:
        mark, path = Path(folder) / "mark", Path(folder) / "ctx.pth"
        bad = {
            "os.system": Payload(os.system, f"touch {mark}"),
            "eval": Payload(eval, f"open({str(mark)!r}, 'w')"),
            "exec": Payload(exec, f"open({str(mark)!r}, 'w')"),
            "open": Payload(open, str(mark), "w"),
            "Path.touch": Payload(Path.touch, mark),
            "os.mkdir": Payload(os.mkdir, str(mark)),
        }[function]
        if zipped:
            torch.save(PLACES[place](bad), path)
        else:
            path.write_bytes(pickle.dumps(PLACES[place](bad), protocol=2))
        with suppress(ValueError):  # or it loads what is a context
            assert torch.equal(load_ctx(path, 64), torch.zeros(4, 64))
        assert not mark.exists()


def test_what_the_payloads_would_do(tmp_path):
    """Or their staying away would say nothing."""
    pickle.loads(pickle.dumps(Payload(os.system, f"touch {tmp_path / 'mark'}")))
    assert (tmp_path / "mark").exists()


PROPERTIES = (
    test_views.test_equals_pil_on_any_size,
    test_an_objective_with_ties_infinities_and_nan,
    test_a_text_tower_of_any_kind,
    test_a_damaged_image_file_never_ends_a_run,
    test_a_checkpoint_runs_nothing,
)
