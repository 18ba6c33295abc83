"""A stream of images: the next ones are decoded and cut into views while this one is tuned."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch

from .result import TuneResult

if TYPE_CHECKING:
    from .tuner import Prepared, Tuner

THREAD_NAMES = "tpt-fast-views"


def stream(tuner: Tuner, images: Iterable, workers: int, keep_views: bool) -> Iterator[TuneResult]:
    """See :meth:`Tuner.map`. Images are taken from ``images`` in the caller's thread: it need not be thread-safe."""
    images, ended = iter(images), None
    ahead: deque[Future[Prepared]] = deque()
    prepare = _on_the_callers_stream(tuner)
    executor = ThreadPoolExecutor(workers, THREAD_NAMES)

    def fill() -> None:
        nonlocal ended
        while ended is None and len(ahead) <= workers:  # one for each worker, and one that is ready
            try:
                ahead.append(executor.submit(prepare, next(images)))
            except Exception as error:  # results that are under way come first
                ended = error

    try:
        fill()
        while ahead:
            views = ahead.popleft()
            error = views.exception()
            fill()  # the workers go on while this one runs
            yield tuner._tune([views.result()], keep_views)[0] if error is None else tuner._failed(error)
        if not isinstance(ended, StopIteration):
            raise ended
    finally:  # also when the consumer closes this early or presses Ctrl-C
        executor.shutdown(cancel_futures=True)


def _on_the_callers_stream(tuner: Tuner) -> Any:
    """The Tuner's way from image to views; on CUDA its kernels queue where those that read the views will."""
    device = tuner.device
    current = torch.cuda.current_stream(device) if device.type == "cuda" else None

    def prepare(image) -> Prepared:
        with torch.cuda.stream(current) if current else nullcontext():
            return tuner._prepare(image)

    return prepare
