"""Tuners, Clips and TextEncoders that are pickled, copied and sent to other processes."""

import copy
import multiprocessing.dummy
import pickle
import re
import threading
import types
from pathlib import Path

import models
import openai_layout
import pytest
import torch

from tpt_fast import TextEncoder, TuneConfig, Tuner
from tpt_fast.clip import Clip
from tpt_fast.demo import PHOTO_FOLDER
from tpt_fast.graphs.replay import Graphs
from tpt_fast.methods import METHODS
from tpt_fast.prompting import CoCoOp

NAMES = ["cat", "sea lion", "ox", "cat"]
PHOTO, OTHER = PHOTO_FOLDER / "rocket.jpg", PHOTO_FOLDER / "cat.jpg"
FEW = {"n_views": 4, "rho": 0.5}


def again(value):
    return pickle.loads(pickle.dumps(value))


WAYS = {"pickle": again, "copy": copy.copy, "deepcopy": copy.deepcopy}


def same(one, other):
    assert one.engines == other.engines
    assert torch.equal(one.logits, other.logits)
    assert torch.equal(one.zero_shot_logits, other.zero_shot_logits)
    assert {k: v for k, v in one.extra.items() if not isinstance(v, torch.Tensor)} == {
        k: v for k, v in other.extra.items() if not isinstance(v, torch.Tensor)
    }


MODELS = {
    "open_clip": lambda: models.clip(std=0.2),
    "resnet": lambda: models.clip(std=0.2, vision=models.RESNET),
    "its own code": lambda: models.clip(std=0.2, vision={"pool_type": "avg"}, text={"no_causal_mask": True}),
    "OpenAI": openai_layout.make,
    "transformers": models.of_transformers,
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", MODELS)
def test_the_same_bits(kind, way):
    tuner = Tuner(MODELS[kind](), NAMES, TuneConfig(**FEW))
    copied = WAYS[way](tuner)
    same(copied(PHOTO), tuner(PHOTO))
    copied.set_classnames(["dog", "ox"])
    assert tuner.classnames == tuple(NAMES)
    assert (copied.clip.model is tuner.clip.model) == (way == "copy")


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_of_another_precision(precision):
    tuner = Tuner(models.clip(std=0.2), NAMES, TuneConfig(**FEW, precision=precision))
    copied = again(tuner)
    assert copied.clip.image.dtype == tuner.clip.image.dtype
    same(copied(PHOTO), tuner(PHOTO))


@pytest.mark.parametrize("method", METHODS)
def test_every_method_goes_on_from_where_it_was(method):
    tuner = Tuner(models.clip(std=0.2), NAMES, TuneConfig(n_views=24, method=method))
    tuner(PHOTO)
    copied = again(tuner)
    torch.manual_seed(3)  # which the published code draws its views from
    want = tuner(OTHER)
    torch.manual_seed(3)
    same(copied(OTHER), want)


def test_contexts_that_were_learned_go_along():
    model = models.clip(std=0.2)
    shapes = (4, 64), (8, 32), (8,), (64, 8), (64,)
    for ctx in (CoCoOp(*(0.1 * torch.randn(shape) for shape in shapes)), 0.1 * torch.randn(len(NAMES), 4, 64)):
        tuner = Tuner(model, NAMES, TuneConfig(**FEW, ctx=ctx))
        same(again(tuner)(PHOTO), tuner(PHOTO))


def test_nothing_is_held_twice():
    """Twice as many numbers as the model has would be a copy of its weights."""
    model = models.clip()
    tuner, own = Tuner(model, NAMES, TuneConfig(**FEW)), len(pickle.dumps(model))
    assert len(pickle.dumps(tuner)) < own + 200_000 + len(pickle.dumps(tuner.clip.text.tokenizer))
    copied = again(tuner)
    assert copied.classes.text.tower is copied.clip.text
    theirs = {p.data_ptr() for p in copied.clip.model.parameters()}
    assert copied.clip.text._packed._weights.table.data_ptr() in theirs


def test_clips_and_encoders():
    model, views = models.clip(std=0.2), torch.randn(2, 3, 32, 32)
    clip = Clip(model)
    copied = again(clip)
    assert torch.equal(copied.image.encode(views), clip.image.encode(views))
    assert torch.equal(next(copied.text.encode([["a cat"]])), next(clip.text.encode([["a cat"]])))
    for engine in ("packed", "module"):
        encoder = TextEncoder(model, NAMES, engine=engine, n_ctx=3, seed=5)
        features, tape = encoder.initial()
        for way in (again, copy.deepcopy):
            other = way(encoder)
            found, other_tape = other.initial()
            grad = torch.randn_like(features)
            assert torch.equal(found, features)
            assert torch.equal(other.backward(other_tape, grad), encoder.backward(tape, grad))


def test_a_jacobian_is_kept():
    encoder = TextEncoder(models.clip(std=0.2), NAMES)
    encoder.keep_jacobian()
    assert torch.equal(again(encoder).initial()[1].rows, encoder.initial()[1].rows)


def test_graphs_are_captured_anew():
    graphs = Graphs(capture=lambda *_: None)
    graphs.why_eager = "a reason of this process"
    for copied in (again(graphs), copy.deepcopy(graphs)):
        assert (copied.captured, copied.why_eager) == (0, None)


def test_a_copy_has_locks_of_its_own():
    tuner = Tuner(models.clip(), NAMES, TuneConfig(**FEW, method="tda"))
    text, memory = tuner.classes.text, tuner.method._memory
    with text._lock, memory.lock:  # as if in the middle of something
        copied = again(tuner)
    assert copied(PHOTO).status == "tuned"


class Locked(torch.nn.Identity):
    def __init__(self):
        super().__init__()
        self.lock = threading.Lock()


def test_a_model_that_cannot_be_pickled_is_named():
    model = models.clip()
    model.visual.register_forward_hook(lambda _m, _x, y: y)
    tuner = Tuner(model, NAMES, TuneConfig(**FEW))
    for value in (tuner, tuner.clip, tuner.classes.text):
        with pytest.raises(pickle.PicklingError, match=r"model: .*open_clip.model.CLIP cannot .*lambda.*TunerSpec"):
            pickle.dumps(value)
    same(copy.deepcopy(tuner)(PHOTO), tuner(PHOTO))  # which copies it all the same
    model = models.clip()
    model.logit_lock = Locked()
    with pytest.raises(pickle.PicklingError, match=r"cannot pickle '_thread.lock' object"):
        pickle.dumps(Tuner(model, NAMES))


def test_documented():
    """But for the processes: their functions would have to be a module's."""
    page = Path(__file__).resolve().parent.parent / "docs" / "how-to" / "servers.md"
    if not page.is_file():
        pytest.skip("there is no documentation here")
    (code,) = re.findall(r"```python\n(.*?)```", page.read_text("utf-8"), re.S)
    module, tuner = types.ModuleType("worker"), Tuner(models.clip(std=0.2), NAMES, TuneConfig(**FEW))
    exec(code, vars(module))
    module.multiprocessing = types.SimpleNamespace(get_context=lambda _method: multiprocessing.dummy)
    assert module.main(again(tuner), [PHOTO, OTHER]) == [tuner(PHOTO).label, tuner(OTHER).label]


def classify(tuner, paths):
    torch.set_num_threads(1)
    assert all(p.is_shared() for p in tuner.clip.model.parameters())
    return [tuner(path) for path in paths]


@pytest.mark.parametrize("start", ["spawn", "forkserver"])
def test_a_worker_runs_it(start):
    tuner = Tuner(models.clip(std=0.2), NAMES, TuneConfig(**FEW))
    with multiprocessing.get_context(start).Pool(1) as pool:
        found = pool.apply(classify, (tuner, [PHOTO, OTHER]))
    for one, path in zip(found, (PHOTO, OTHER), strict=True):
        same(one, tuner(path))
