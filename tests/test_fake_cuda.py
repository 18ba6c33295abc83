"""What a GPU would be asked to do, seen without one (see fake_cuda.py); test_tuner_on_cuda.py has the rest."""

from dataclasses import replace

import models
import open_clip
import pytest
import torch
from fake_cuda import DEVICE, Count, on_cuda
from torch._subclasses.fake_tensor import FakeTensorMode

from tpt_fast import TuneConfig, Tuner
from tpt_fast._stages import Stages
from tpt_fast.graphs.capturable import ObstacleFinder
from tpt_fast.graphs.replay import Captured, Graphs
from tpt_fast.models import read
from tpt_fast.models.weights import Unsupported
from tpt_fast.ops import prefix_attention
from tpt_fast.text import packed

NAMES = ["cat", "dog", "sports car", "dog"]
TOWERS = {"vit": {"patch_size": 16}, "resnet": models.RESNET}


def tuner(tower="vit", names=NAMES, **options):
    model = models.clip(seed=0, embed=64, vision=TOWERS[tower])
    return Tuner(model, names, TuneConfig(n_views=8, rho=0.3, **options))


@pytest.fixture
def mode():
    return FakeTensorMode()


def views(of, images=1):
    return torch.empty(images, 8, 3, *of.clip.image.sides, dtype=of.clip.image.dtype, device=DEVICE)


def run(twin, images=1):
    with torch.no_grad(), ObstacleFinder() as finder:
        results = twin.run(twin.classes, views(twin, images), Stages())
    assert results.data.device == DEVICE
    return finder


CASES = {
    "vit": {},
    "resnet": {"tower": "resnet"},
    "fp16": {"precision": "fp16"},
    "bf16": {"precision": "bf16", "tower": "resnet"},
    "three steps": {"steps": 3},
    "no step": {"steps": 0},
    "no name twice": {"names": NAMES[:3]},
    "one context a class": {"ctx": torch.zeros(3, 4, 64), "names": NAMES[:3]},
    "activations made again": {"activations": "recompute"},
}


@pytest.mark.parametrize("images", [1, 3])
@pytest.mark.parametrize("case", CASES)
def test_the_loop_stays_on_the_device(mode, case, images):
    twin = on_cuda(tuner(**CASES[case]), mode)
    with mode:
        finder = run(twin, images)
    assert finder.obstacle is None


def meddle(monkeypatch, twin, change):
    encode = twin.clip.image.encode
    monkeypatch.setattr(twin.clip.image, "encode", lambda views, *more: change(encode(views, *more)))


def test_another_device_is_an_obstacle(mode, monkeypatch):
    twin = on_cuda(tuner(), mode)
    meddle(monkeypatch, twin, lambda t: t.cpu().to(DEVICE))
    with mode:
        assert run(twin).obstacle == "aten._to_copy.default touches cpu and cuda:0"


def test_what_surrounds_a_replay(mode, monkeypatch):
    """The views are copied to where the graph reads them, and the results from where it writes them."""
    twin = on_cuda(tuner(), mode)
    with mode, torch.no_grad():
        given = views(twin)
        results = twin.run(twin.classes, given, Stages())
        stream = type("Stream", (), {"record_event": lambda self: None})()
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
        graphs = Graphs(lambda run, given: Captured(given.clone(), results, lambda: None))
        for _ in range(2):
            graphs(lambda given: results, given)
        with Count() as count:
            bundle = graphs(lambda given: pytest.fail("was captured already"), given)
            bundle.data.cpu()
    assert len(count.ops) <= 3, count.ops  # the views in, the results out of the graph's memory and to the host


@pytest.mark.slow
def test_a_thousand_classes_fit_in_three_gigabytes(mode):
    """But for what a kernel allocates inside, and for what the allocator does not use."""
    torch.manual_seed(0)
    model = open_clip.create_model("ViT-B-16").eval()
    big = Tuner(model, open_clip.zero_shot_metadata.IMAGENET_CLASSNAMES)
    twin = on_cuda(big, mode)
    with mode, torch.no_grad(), Count() as count:
        twin.run(twin.classes, torch.empty(1, 64, 196, 768, device=DEVICE), Stages())
    weights, held = sum(p.nbytes for p in model.parameters()), big.memory().own
    print(f"model {weights / 1e9:.2f}, Tuner {held / 1e9:.2f}, loop {count.peak / 1e9:.2f} GB")
    assert count.peak > 64 * 196 * 768 * 4
    assert weights + held + count.peak < 3e9


def test_heads_that_the_kernels_do_not_take_are_refused_before_they_are_launched(mode, monkeypatch):
    with mode:
        q, kv = torch.empty(1, 6, 258, device=DEVICE), torch.empty(1, 6, 516, device=DEVICE)
        offsets = torch.tensor([2, 4, 6], device=DEVICE)
        with pytest.raises(ValueError, match="heads: expected heads of at most 128 on CUDA, got 2 of 129"):
            prefix_attention(q, kv, offsets, 2, 2)
    model = models.clip(embed=64, vision=TOWERS["vit"])
    family = read(model)
    weights = family.text_weights(torch.float32)
    with mode:
        on_device = replace(weights, table=torch.empty(weights.table.shape, device=DEVICE))
    monkeypatch.setattr(family, "text_weights", lambda dtype: on_device)
    packed.PackedTower(family, torch.float32)
    monkeypatch.setattr(packed, "MAX_CUDA_HEAD", 31)
    with pytest.raises(Unsupported, match="heads of 32 are wider than the 31 of the CUDA kernels"):
        packed.PackedTower(family, torch.float32)
