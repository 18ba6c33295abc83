"""Streams of images: order, look-ahead, broken images, and no thread left behind."""

import gc
import itertools
import math
import signal
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from types import SimpleNamespace

import models
import pytest
import torch

from tpt_fast import TuneConfig, Tuner
from tpt_fast.demo import PHOTO_FOLDER
from tpt_fast.stream import THREAD_NAMES, SideStream
from tpt_fast.views.decode import load_image

NAMES = ["cat", "dog", "goldfish"]
PHOTO = PHOTO_FOLDER / "cat.jpg"


@pytest.fixture(scope="module")
def model():
    return models.clip(vision={"layers": 1})


@pytest.fixture(scope="module")
def tuner(model):
    return Tuner(model, NAMES, TuneConfig(n_views=8, rho=0.4))


@pytest.fixture(scope="module")
def images():
    return [(255 * torch.rand(size, 50, 3)).byte() for size in (90, 40, 200, 33, 61)]


@pytest.fixture(autouse=True)
def _no_thread_is_left():
    yield
    assert not left()


def left():
    return [thread for thread in threading.enumerate() if thread.name.startswith(THREAD_NAMES)]


@pytest.mark.parametrize("kind", [torch.from_numpy, lambda array: array], ids=["tensor", "array"])
def test_a_producer_that_writes_into_one_buffer(tuner, images, kind):
    def frames():
        buffer = images[0].numpy().copy()
        for shift in range(4):
            buffer[:] = images[0].numpy() + shift * 40
            yield kind(buffer)

    results = list(tuner.map(frames()))
    for result, frame in zip(results, frames(), strict=True):
        assert torch.equal(result.logits, tuner(frame).logits)


class Counted:
    """An endless stream that knows how many images were taken from it."""

    def __init__(self, images):
        self.images, self.taken = itertools.cycle(images), 0

    def __iter__(self):
        return self

    def __next__(self):
        self.taken += 1
        return next(self.images)


@pytest.mark.parametrize("workers", [1, 2, 9])
def test_results_come_in_order_and_are_those_of_single_calls(tuner, images, workers):
    found = list(tuner.map(iter(images), workers=workers, keep_views=True))
    assert len(found) == len(images)
    for got, image in zip(found, images, strict=True):
        want = tuner(image, keep_views=True)
        assert all(torch.equal(getattr(got, name), getattr(want, name)) for name in ("logits", "ctx", "views"))
        assert got.timings.keys() == want.timings.keys()
        assert got.error is None


def test_an_empty_stream(tuner):
    assert list(tuner.map([])) == []


def test_a_broken_image_carries_its_error_and_the_stream_goes_on(tuner, images, tmp_path):
    (tmp_path / "half.jpg").write_bytes(PHOTO.read_bytes()[:2000])
    broken = [images[0], tmp_path / "half.jpg", images[1], tmp_path / "missing.jpg", 7, images[2]]
    found = list(tuner.map(broken))
    assert [result.status for result in found] == ["tuned", "failed", "tuned", "failed", "failed", "tuned"]
    kinds = [type(result.error) for result in found if result.error]
    assert kinds == [ValueError, FileNotFoundError, TypeError]
    assert torch.equal(found[5].logits, tuner(images[2]).logits)
    failed = found[1]
    assert failed.logits.shape == (3,)
    assert failed.logits.isnan().all()
    assert math.isnan(failed.loss)
    assert failed.classnames == tuple(NAMES)
    assert "half.jpg" in repr(failed)
    for read in (lambda: failed.label, lambda: failed.index, lambda: failed.topk(1)):
        with pytest.raises(ValueError, match=r"no prediction, the image could not be read: .*half.jpg") as caught:
            read()
        assert caught.value.__cause__ is failed.error


@pytest.mark.parametrize("workers", [1, 3])
def test_look_ahead_is_bounded(tuner, images, workers):
    images = Counted(images)
    results = tuner.map(images, workers=workers)
    assert images.taken == 0
    for i in range(1, 6):
        next(results)
        assert i <= images.taken <= i + workers + 1
    results.close()


def test_the_next_image_is_read_while_this_one_runs(tuner, images, monkeypatch):
    """The first image waits in its tuning until the second one is there: one after the other would wait for ever."""
    tune, second, count = tuner.finish, threading.Event(), itertools.count(1)

    def load_and_tell(*arguments):
        result = load_image(*arguments)
        if next(count) == 2:
            second.set()
        return result

    def tune_when_the_second_is_there(*args, **options):
        assert second.wait(30)
        return tune(*args, **options)

    monkeypatch.setattr("tpt_fast.tuner.load_image", load_and_tell)
    monkeypatch.setattr(tuner, "finish", tune_when_the_second_is_there)
    assert len(list(tuner.map(images[:3], workers=1))) == 3


def test_on_cuda_views_are_made_on_a_stream_of_their_own(tuner, images, monkeypatch):
    """With a stand-in for CUDA's streams: what waits for what. ``test_tuner_on_cuda.py`` has the real ones."""
    said, mine = [], threading.get_ident()

    class Stream:
        def __init__(self, name):
            self.name = name

        def record_event(self):
            said.append(("record", self.name, threading.get_ident() == mine))
            return SimpleNamespace(name=self.name, synchronize=lambda: said.append(("synchronize", self.name)))

        def wait_event(self, event):
            said.append(("wait", self.name, event.name))

    monkeypatch.setattr(torch.cuda, "Stream", lambda device: Stream("beside"))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream("caller's"))
    monkeypatch.setattr(torch.cuda, "stream", nullcontext)
    side = SideStream(torch.device("cuda"))
    task = side.task(lambda image: said.append("prepare") or tuner.prepare(image), images[0])
    assert said == [("record", "caller's", True)]
    with ThreadPoolExecutor(1) as pool:
        prepared = pool.submit(task).result()
    assert torch.equal(prepared.views, tuner.prepare(images[0]).views)
    rest = [("wait", "beside", "caller's"), "prepare", ("record", "beside", False), ("synchronize", "beside")]
    assert said[1:] == rest


def test_closing_early_and_forgetting_leave_no_thread(tuner, images):
    results = tuner.map(Counted(images))
    next(results)
    assert left()
    results.close()
    assert not left()
    results = tuner.map(Counted(images))
    next(results)
    del results
    gc.collect()
    assert not left()


@pytest.fixture
def _interruptible():
    """Also where a shell has started the tests in the background, and so told them to ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("_interruptible")
def test_ctrl_c_stops_it(tuner, images):
    found, stream = [], Counted(images)
    threading.Timer(0.5, signal.raise_signal, [signal.SIGINT]).start()
    with pytest.raises(KeyboardInterrupt):
        found.extend(tuner.map(stream))
    assert stream.taken > 0
    assert not left()


def test_pairs_of_image_and_label_are_no_images(tuner, images):
    with pytest.raises(TypeError, match=r"images: expected one image at a time, got a tuple of 2 \(Tensor, int\); for"):
        list(tuner.map([(images[0], 3)]))


def test_boxes_that_an_image_cannot_have_are_its_failure(tuner, images, monkeypatch):
    """Views are made in the caller's thread on a CPU: what they say of one image does not end the stream either."""
    monkeypatch.setattr("tpt_fast.tuner.draw_boxes", lambda *_, **__: torch.tensor([[0, 0, 60, 60, 0]]))
    found = list(tuner.map(images))
    assert [result.status for result in found] == ["failed" if min(i.shape[:2]) < 60 else "tuned" for i in images]


def test_an_error_of_the_tuning_itself_ends_it(tuner, images, monkeypatch):
    def failing(*_, **__):
        raise MemoryError("full")

    monkeypatch.setattr(tuner, "finish", failing)
    with pytest.raises(MemoryError, match="full"):
        list(tuner.map(Counted(images)))
    assert not left()


def test_an_error_that_is_not_the_images_ends_it(tuner, images, monkeypatch):
    def failing(*_):
        raise ImportError("no decoder")

    monkeypatch.setattr("tpt_fast.tuner.load_image", failing)
    with pytest.raises(ImportError, match="no decoder"):
        list(tuner.map(images))
    assert not left()


def test_what_the_stream_itself_raises_comes_after_the_results_before_it(tuner, images):
    def failing():
        yield from images[:2]
        raise LookupError("the camera is gone")

    found = []
    with pytest.raises(LookupError, match="the camera is gone"):
        found.extend(tuner.map(failing()))
    assert len(found) == 2


def test_strict_official_draws_in_order(model, images):
    strict = Tuner(model, NAMES, TuneConfig(n_views=11, strict_official=True))
    torch.manual_seed(3)
    want = [strict(image, keep_views=True).views for image in images]
    torch.manual_seed(3)
    for got, views in zip(strict.map(images, workers=3, keep_views=True), want, strict=True):
        assert torch.equal(got.views, views)


def test_messages(tuner):
    with pytest.raises(TypeError, match="images: expected an iterable of images, got str"):
        tuner.map("cat.jpg")
    with pytest.raises(TypeError, match="images: expected an iterable of images, got int"):
        tuner.map(3)
    with pytest.raises(ValueError, match="workers: expected 1 or more, got 0"):
        tuner.map([], workers=0)
    with pytest.raises(TypeError, match="workers: expected an int, got float"):
        tuner.map([], workers=1.5)
