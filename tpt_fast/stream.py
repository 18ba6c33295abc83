"""A stream of images: the next ones are decoded and cut into views while this one is tuned."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from .result import TuneResult
from .views.decode import UNREADABLE

if TYPE_CHECKING:
    from .tuner import Prepared, Tuner

THREAD_NAMES = "tpt-fast-views"


def stream(tuner: Tuner, images: Iterable, workers: int, keep_views: bool) -> Iterator[TuneResult]:
    """See :meth:`Tuner.map`. Images are taken from ``images`` in the caller's thread: it need not be thread-safe."""
    images, ended = iter(images), None
    ahead: deque[Future[Prepared]] = deque()
    beside = Beside(tuner.device) if tuner.device.type == "cuda" else None
    executor = ThreadPoolExecutor(workers, THREAD_NAMES)

    def fill() -> None:
        nonlocal ended
        while ended is None and len(ahead) <= workers:  # one for each worker, and one that is ready
            try:
                image = _held(next(images))
                task = beside.task(tuner._prepare, image) if beside else partial(tuner._prepare, image)
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
            yield tuner._tune([views.result()], keep_views)[0] if error is None else tuner._failed(error)
        if not isinstance(ended, StopIteration):
            raise ended
    finally:  # also when the consumer closes this early or presses Ctrl-C
        executor.shutdown(cancel_futures=True)


def _held(image):
    """``image``, safe from a producer that writes the next one into the same memory, as readers of video do."""
    if isinstance(image, Tensor):
        return image.clone()
    return image.copy() if isinstance(image, np.ndarray) else image


class Beside:
    """A CUDA stream beside the caller's: copies and views of the next images run there while this one is tuned."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._stream = device, torch.cuda.Stream(device)

    def task(self, prepare: Callable, image) -> Callable[[], Prepared]:
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
