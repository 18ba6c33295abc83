"""The whole loop on a GPU: its answers are the CPU's, a captured loop's bits are the eager ones, and nothing waits."""

import gc
import warnings
from concurrent.futures import ThreadPoolExecutor

import bounds
import models
import open_clip
import pytest
import torch
from torchvision.io import decode_jpeg

from tpt_fast import TuneConfig, Tuner
from tpt_fast._stages import Stages
from tpt_fast.demo import PHOTO_FOLDER
from tpt_fast.stream import SideStream
from tpt_fast.views.decode import load_image

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")

NAMES = ["cat", "dog", "sports car", "goldfish", "dog"]
PHOTO = PHOTO_FOLDER / "cat.jpg"
FIELDS = ("logits", "zero_shot_logits", "entropies", "selected", "ctx", "grad")


def make():
    vision = {"image_size": 64, "layers": 3, "width": 128, "patch_size": 16, "head_width": 64}
    return models.clip(embed=64, std=128**-0.5, vision=vision, text={"width": 128, "layers": 3})


@pytest.fixture(scope="module")
def model():
    return make().cuda()


def tuner(model, objective=None, **options):
    return Tuner(model, NAMES, TuneConfig(n_views=16, rho=0.3, **options), objective=objective)


@pytest.fixture(scope="module")
def allowed():
    """What rounding does to an answer, in float32."""
    views = tuner(make())(PHOTO, keep_views=True).views
    return bounds.answers(make(), views, NAMES, rho=0.3)


def same_bits(one, two):
    for field in FIELDS:
        assert torch.equal(getattr(one, field), getattr(two, field)), field


def test_answers_are_the_cpus(model, allowed):
    got, want = tuner(model)(PHOTO), tuner(make())(PHOTO)
    assert got.engines["ops"] == "native"
    assert got.engines["device"].startswith("cuda")
    assert got.selected.tolist() == want.selected.tolist()
    bounds.assert_same_answer(got, want, allowed)


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("steps", [1, 2])
def test_replays_are_the_eager_bits(model, precision, steps):
    eager = tuner(model, precision=precision, steps=steps, cuda_graphs=False)
    graphed = tuner(model, precision=precision, steps=steps)
    results = [graphed(PHOTO) for _ in range(4)]
    assert graphed.graphs.why_eager is None
    assert graphed.graphs.captured
    assert results[-1].engines["loop"] == "CUDA graph"
    want = eager(PHOTO)
    assert want.engines["loop"] == "eager"
    for result in results:
        same_bits(result, want)
    other = PHOTO_FOLDER / "rocket.jpg"
    same_bits(graphed(other), eager(other))


def test_the_models_own_text_tower_runs_eagerly(model, allowed):
    own, packed = tuner(model, engine="module"), tuner(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        results = [own(PHOTO) for _ in range(3)]
    assert results[-1].engines["loop"] == "eager"
    bounds.assert_same_answer(results[-1], packed(PHOTO), allowed)


def test_threads_capture_with_handles_of_their_own(model):
    """One warms a shape up, another captures it."""
    graphed = tuner(model)
    results = [graphed(PHOTO)]
    with ThreadPoolExecutor(1) as other:
        results += [other.submit(graphed, PHOTO).result() for _ in range(2)]
    assert graphed.graphs.why_eager is None
    for result in results[1:]:
        same_bits(result, results[0])


def test_the_loop_waits_for_nothing(model):
    for steps in (1, 3):
        waiting = tuner(model, steps=steps, cuda_graphs=False)
        views = torch.randn(2, 16, 3, 64, 64, device="cuda")
        waiting.run(waiting.classes, views, Stages())
        torch.cuda.set_sync_debug_mode("error")
        try:
            waiting.run(waiting.classes, views, Stages())
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_batches_and_streams(model, allowed):
    graphed, photos = tuner(model), [PHOTO_FOLDER / name for name in ("cat.jpg", "rocket.jpg", "temple.jpg")]
    one_by_one = [graphed(photo) for photo in photos]
    for one, two in zip(graphed.map(photos * 2), one_by_one * 2, strict=True):
        same_bits(one, two)
    for _ in range(3):
        for one, two in zip(graphed.tune_batch(photos), one_by_one, strict=True):
            assert one.selected.tolist() == two.selected.tolist()
            bounds.assert_same_answer(one, two, allowed)


def test_the_next_images_views_are_made_while_this_one_runs(model):
    """The caller's stream is busy for a long time; what the worker waits for has to be done long before that ends."""
    graphed, side = tuner(model), SideStream(torch.device("cuda"))
    want = graphed.prepare(PHOTO).views
    side.task(graphed.prepare, PHOTO)()  # what a first call allocates might wait for the device
    task = side.task(graphed.prepare, PHOTO)
    busy, end = torch.cuda.Event(), torch.cuda.Event()
    busy.record()
    torch.cuda._sleep(1_000_000_000)  # about half a second
    end.record()
    with ThreadPoolExecutor(1) as pool:
        prepared = pool.submit(task).result()
    assert busy.query()
    assert not end.query()
    side.hand_over(prepared.views)
    assert torch.equal(prepared.views, want)


def test_images_on_the_device_are_waited_for(model):
    graphed, image = tuner(model), torch.zeros(300, 400, 3, dtype=torch.uint8, device="cuda")
    final = torch.randint(0, 256, image.shape, dtype=torch.uint8, device="cuda")
    want = graphed(final)
    torch.cuda.synchronize()

    def images():
        torch.cuda._sleep(20_000_000)  # about 10 ms
        image.copy_(final)
        yield image

    (got,) = graphed.map(images())
    same_bits(got, want)


def test_jpeg_files_are_decoded_on_the_device(model):
    decode_jpeg(torch.frombuffer(bytearray(PHOTO.read_bytes()), dtype=torch.uint8), device="cuda")  # or why not
    pixels = load_image(PHOTO, "torchvision", "cuda")
    assert pixels.is_cuda
    assert pixels.shape == load_image(PHOTO).shape
    assert (pixels.cpu().float() - load_image(PHOTO)).abs().mean() < 2
    results = list(tuner(model, decoder="torchvision").map([PHOTO] * 3))
    assert [result.status for result in results] == ["tuned"] * 3


def test_half_types_agree_with_float32(model):
    want = tuner(model)(PHOTO)
    for precision, dtype in (("fp16", torch.float16), ("bf16", torch.bfloat16)):
        got = tuner(model, precision=precision)(PHOTO)
        difference = bounds.logits(model, torch.float32, dtype)
        bounds.assert_within(got.zero_shot_logits, want.zero_shot_logits, difference, precision)


def test_an_own_objective_runs_eagerly(model):
    def entropy_of_the_mean(logits):
        mean = logits.softmax(-1).mean(0)
        return -(mean * mean.log()).sum()

    custom = tuner(model, entropy_of_the_mean)
    results = [custom(PHOTO) for _ in range(3)]
    assert {result.engines["loop"] for result in results} == {"eager"}


def test_memory_goes_with_the_tuner(model):
    for _ in range(3):
        tuner(model)(PHOTO)  # libraries keep what they have once allocated
    gc.collect()
    before = torch.cuda.memory_allocated()
    graphed = tuner(model)
    for _ in range(3):
        graphed(PHOTO)
    assert torch.cuda.memory_allocated() > before
    assert graphed.memory()["CUDA graphs"].own > graphed.prepare(PHOTO).views.nbytes
    del graphed
    gc.collect()
    assert torch.cuda.memory_allocated() <= before + (1 << 16)


def test_a_thousand_classes_fit_in_three_gigabytes():
    torch.manual_seed(0)
    big = open_clip.create_model("ViT-B-16").eval().cuda()
    torch.cuda.reset_peak_memory_stats()
    wide = Tuner(big, open_clip.zero_shot_metadata.IMAGENET_CLASSNAMES)
    for _ in range(3):
        wide(PHOTO)
    assert torch.cuda.max_memory_allocated() < 3e9
