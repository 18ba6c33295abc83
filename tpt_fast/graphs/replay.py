"""CUDA graphs: the loop of one shape of views is captured once and replayed, so that the host launches one thing."""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from .._locks import Lock
from .bundle import Bundle
from .capturable import ObstacleFinder

Run = Callable[[Tensor], Bundle]

KEPT = 4  # shapes, i.e. sizes of batches


class CaptureWarning(UserWarning):
    """The loop cannot be captured as a CUDA graph and runs eagerly: same results, more work for the host."""


@dataclass(frozen=True)
class Captured:
    """A graph that reads ``given`` and writes ``results`` whenever it is replayed."""

    given: Tensor
    results: Bundle
    replay: Callable[[], None]


class Graphs:
    """Runs a function of one tensor, from its second call with a shape on by replaying a graph of it.

    The first call of a shape warms libraries up, eagerly, and tells whether the function can be captured; the second
    captures. Where it cannot, or a capture fails, one :class:`CaptureWarning` says why, and the function goes on
    eagerly. Calls from several threads and streams take turns, in the order of the calls. Nothing here waits for the
    device, but for the capture itself.

    Args:
        capture: makes a :class:`Captured` of a function and an example; CUDA's unless a test says otherwise.
    """

    def __init__(self, capture: Callable[[Run, Tensor], Captured] | None = None) -> None:
        self._capture = capture or _Cuda()
        self._captured: OrderedDict[tuple, Captured | None] = OrderedDict()  # None: seen once
        self._turn: torch.cuda.Event | None = None
        self._lock = Lock()
        self.why_eager: str | None = None  #: why nothing is captured any more

    def __reduce__(self) -> tuple[type[Graphs], tuple[()]]:
        return Graphs, ()  # a copy captures its own

    @property
    def captured(self) -> int:
        """How many shapes are replayed."""
        return sum(captured is not None for captured in self._captured.values())

    @property
    def bytes(self) -> int:
        """Memory that the captured loops compute in, which is theirs while they are kept."""
        inputs = sum(captured.given.nbytes for captured in self._captured.values() if captured is not None)
        return inputs + getattr(self._capture, "bytes", 0)

    def __call__(self, run: Run, given: Tensor) -> Bundle:
        """``run(given)``, which is the caller's own."""
        key = (given.shape, given.dtype, given.device)
        with self._lock:
            captured, first = self._captured.get(key), key not in self._captured
            if captured is None and not first and self.why_eager is None:
                captured = self._try(run, given)
            self._captured[key] = captured
            self._captured.move_to_end(key)
            while len(self._captured) > KEPT:
                self._captured.popitem(last=False)
            if captured is not None:
                return self._replay(captured, given)
        if not first or self.why_eager is not None:
            return run(given)
        with ObstacleFinder() as finder:
            results = run(given)
        if finder.obstacle is not None:
            self._give_up(finder.obstacle)
        return results

    def _try(self, run: Run, given: Tensor) -> Captured | None:
        try:
            return self._capture(run, given)
        except RuntimeError as error:  # also torch.cuda.OutOfMemoryError
            self._give_up(str(error).strip().partition("\n")[0])
            return None

    def _give_up(self, why: str) -> None:
        self.why_eager = why
        warnings.warn(
            f"tpt_fast: the loop cannot be captured as a CUDA graph and runs eagerly: {why} "
            "(cuda_graphs=False silences this)",
            CaptureWarning,
            stacklevel=5,
        )

    def _replay(self, captured: Captured, given: Tensor) -> Bundle:
        cuda = torch.cuda.current_stream(given.device) if given.is_cuda else None
        if cuda and self._turn:
            cuda.wait_event(self._turn)  # the last call may have come on another stream
        captured.given.copy_(given)
        captured.replay()
        results = captured.results.clone()
        if cuda:
            self._turn = cuda.record_event()
        return results


class _Cuda:
    """Captures on a stream of its own, all graphs in one pool of memory: they never run at the same time, and their
    results are copied before the next one runs."""

    def __init__(self) -> None:
        self._pool: Any = None
        self.bytes = 0

    def __call__(self, run: Run, given: Tensor) -> Captured:
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        graph, given = torch.cuda.CUDAGraph(), given.clone()
        stream, caller = _capture_stream(given.device), torch.cuda.current_stream(given.device)
        # Other threads may go on decoding images and allocating memory meanwhile.
        capture = torch.cuda.graph(graph, pool=self._pool, stream=stream, capture_error_mode="thread_local")
        # The caller's stream is entered because a capture that fails leaves its own as the current one.
        with torch.cuda.device(given.device), torch.cuda.stream(caller):
            stream.wait_stream(caller)
            with torch.cuda.stream(stream):
                run(given)  # the first call may have been another thread's, and libraries' handles belong to a thread
            with capture:
                # Now, for beginning a capture gives back to the device what was only cached.
                before = torch.cuda.memory_reserved(given.device)
                results = run(given)
                self.bytes += torch.cuda.memory_reserved(given.device) - before
        return Captured(given, results, graph.replay)


@cache
def _capture_stream(device: torch.device) -> torch.cuda.Stream:
    """One a device: torch's own is made on the device that is current at the first capture, and each stream has a
    workspace of cuBLAS."""
    return torch.cuda.Stream(device)
