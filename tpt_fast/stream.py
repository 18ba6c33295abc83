"""A stream of images: the next ones are decoded and cut into views while this one is classified."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from .views.decode import UNREADABLE

THREAD_NAMES = "tpt-fast-views"

Ahead = TypeVar("Ahead")
Result = TypeVar("Result")


class Prepared(NamedTuple):
    """One image's views as the image tower reads them, [N, 3, H, W] or cut into patches, and the seconds of each stage
    that made them."""

    views: Tensor
    seconds: dict[str, float]


@dataclass(frozen=True)
class Steps(Generic[Ahead, Result]):
    """What is done with each image of a stream. ``ahead`` and ``prepare`` may say that it cannot be read
    (:data:`~tpt_fast.views.decode.UNREADABLE`)."""

    ahead: Callable[[Any], Ahead]  #: in a worker thread
    prepare: Callable[[Ahead], Prepared]  #: in the caller's thread, as the others
    finish: Callable[[Prepared], Result]
    fail: Callable[[BaseException], Result]  #: for an image that cannot be read


def stream(
    steps: Steps[Any, Result], images: Iterable, device: torch.device, workers: int
) -> Generator[Result, None, None]:
    """See :meth:`tpt_fast.Tuner.map`. Images are taken from ``images`` in the caller's thread: it need not be
    thread-safe."""
    source = iter(images)
    ended: BaseException | None = None
    ahead: deque[Future] = deque()
    side = SideStream(device) if device.type == "cuda" else None
    executor = ThreadPoolExecutor(workers, THREAD_NAMES)

    def fill() -> None:
        nonlocal ended
        while ended is None and len(ahead) <= workers:  # one for each worker, and one that is ready
            try:
                image = _copied(next(source))
                task = side.task(steps.ahead, image) if side else partial(steps.ahead, image)
                ahead.append(executor.submit(task))
            except Exception as error:  # results that are under way come first
                ended = error

    try:
        fill()
        while ahead:
            coming = ahead.popleft()
            coming.exception()  # waits
            fill()  # the workers go on while this one runs
            try:
                prepared = steps.prepare(coming.result())
            except UNREADABLE as error:
                yield steps.fail(error)
                continue
            if side:
                side.hand_over(prepared.views)
            yield steps.finish(prepared)
        if ended is not None and not isinstance(ended, StopIteration):
            raise ended
    finally:  # also when the consumer closes this early or presses Ctrl-C
        executor.shutdown(cancel_futures=True)


def _copied(image: Any) -> Any:
    """``image``, safe from a producer that writes the next one into the same memory, as readers of video do.

    Raises:
        TypeError: it is not one image but several things, as data sets of torchvision yield them.
    """
    if isinstance(image, (tuple, list)):
        kinds = ", ".join(type(each).__name__ for each in image)
        raise TypeError(
            f"images: expected one image at a time, got a {type(image).__name__} of {len(image)} ({kinds}); "
            "for pairs of image and label write map(image for image, _ in pairs)"
        )
    if isinstance(image, Tensor):
        return image.clone()
    return image.copy() if isinstance(image, np.ndarray) else image


class SideStream:
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
