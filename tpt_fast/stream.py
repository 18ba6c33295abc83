"""A stream of images: the next ones are decoded and cut into views while this one is classified."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from .views.decode import UNREADABLE

THREAD_NAMES = "tpt-fast-views"

Result = TypeVar("Result")


class Prepared(NamedTuple):
    """One image's views as the image tower reads them, [N, 3, S, S] or cut into patches, and the seconds of each stage
    that made them."""

    views: Tensor
    seconds: dict[str, float]


class Steps(NamedTuple, Generic[Result]):
    """What is done with each image of a stream."""

    prepare: Callable[[Any], Prepared]  #: in a worker thread
    finish: Callable[[Prepared], Result]  #: in the caller's thread
    fail: Callable[[BaseException], Result]  #: the same, for an image that cannot be read


def stream(steps: Steps[Result], images: Iterable, device: torch.device, workers: int) -> Iterator[Result]:
    """See :meth:`tpt_fast.Tuner.map`. Images are taken from ``images`` in the caller's thread: it need not be
    thread-safe."""
    images, ended = iter(images), None
    ahead: deque[Future[Prepared]] = deque()
    beside = Beside(device) if device.type == "cuda" else None
    executor = ThreadPoolExecutor(workers, THREAD_NAMES)

    def fill() -> None:
        nonlocal ended
        while ended is None and len(ahead) <= workers:  # one for each worker, and one that is ready
            try:
                image = _held(next(images))
                task = beside.task(steps.prepare, image) if beside else partial(steps.prepare, image)
                ahead.append(executor.submit(task))
            except Exception as error:  # results that are under way come first
                ended = error

    try:
        fill()
        while ahead:
            views = ahead.popleft()
            error = views.exception()
            if error is not None and not isinstance(error, UNREADABLE):
                raise error
            fill()  # the workers go on while this one runs
            if error is None and beside:
                beside.hand_over(views.result().views)
            yield steps.finish(views.result()) if error is None else steps.fail(error)
        if not isinstance(ended, StopIteration):
            raise ended
    finally:  # also when the consumer closes this early or presses Ctrl-C
        executor.shutdown(cancel_futures=True)


def _held(image: Any) -> Any:
    """``image``, safe from a producer that writes the next one into the same memory, as readers of video do."""
    if isinstance(image, Tensor):
        return image.clone()
    return image.copy() if isinstance(image, np.ndarray) else image


class Beside:
    """A CUDA stream beside the caller's: copies and views of the next images run there while this one is classified."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._stream = device, torch.cuda.Stream(device)

    def task(self, prepare: Callable, image: Any) -> Callable[[], Prepared]:
        """``prepare(image)`` for a worker thread, which also waits until it is done; called in the caller's thread."""
        given = torch.cuda.current_stream(self._device).record_event()  # the image may be a tensor still to be written

        def run() -> Prepared:
            with torch.cuda.stream(self._stream):
                self._stream.wait_event(given)
                prepared = prepare(image)
                self._stream.record_event().synchronize()
            return prepared

        return run

    def hand_over(self, views: Tensor) -> None:
        """Their memory is free for the views of a later image only when the caller's stream has read it."""
        views.record_stream(torch.cuda.current_stream(self._device))
