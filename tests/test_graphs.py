"""The bookkeeping of captured loops, with a stand-in for CUDA's capture; test_tuner_on_cuda.py has the rest."""

import gc
import re
import threading
import time
import warnings
import weakref
from contextlib import nullcontext

import pytest
import torch

from tpt_fast import graphs
from tpt_fast.graphs.bundle import Bundle
from tpt_fast.graphs.replay import Captured, CaptureWarning, Graphs


def computed(given):
    return Bundle.of({"double": 2 * given, "sum": given.sum().view(1)})


class Recorder:
    """Like a graph: after the capture ``run`` is called no more, and results lie where they lay then."""

    def __init__(self, error=None, seconds=0.0):
        self.captures, self.replays, self.error, self.seconds = 0, 0, error, seconds

    def __call__(self, run, given):
        self.captures += 1
        if self.error is not None:
            raise self.error
        given = given.clone()
        results = run(given)

        def replay():
            self.replays += 1
            time.sleep(self.seconds)  # in which another thread could put its own input in the place of this one's
            results.data.copy_(computed(given).data)

        return Captured(given, results, replay)


class Loop:
    def __init__(self):
        self.calls = 0

    def __call__(self, given):
        self.calls += 1
        return computed(given)


def check(results, given):
    found = results.to_cpu()
    twice, total = found["double"], found["sum"]
    assert torch.equal(twice, 2 * given)
    assert total.item() == pytest.approx(given.sum().item())


def test_eager_first_then_captured_then_replayed():
    recorder, loop = Recorder(), Loop()
    kept = Graphs(recorder)
    for calls, captures, replays in [(1, 0, 0), (2, 1, 1), (2, 1, 2), (2, 1, 3)]:
        given = torch.randn(3, 4)
        check(kept(loop, given), given)
        assert (loop.calls, recorder.captures, recorder.replays) == (calls, captures, replays)


def test_results_are_the_callers_own():
    kept, first, second = Graphs(Recorder()), torch.randn(3), torch.randn(3)
    kept(Loop(), first), kept(Loop(), first)
    one, two = kept(Loop(), first), kept(Loop(), second)
    check(one, first)
    check(two, second)


def test_each_shape_has_its_graph_and_only_some_are_kept(monkeypatch):
    monkeypatch.setattr(graphs.replay, "KEPT", 2)
    recorder = Recorder()
    kept = Graphs(recorder)
    for size in (1, 2, 1, 2, 1, 2):
        given = torch.randn(size)
        check(kept(Loop(), given), given)
    assert (recorder.captures, recorder.replays) == (2, 4)
    kept(Loop(), torch.randn(3))  # the oldest goes
    kept(Loop(), torch.randn(1))
    assert recorder.captures == 2
    kept(Loop(), torch.randn(1))
    assert recorder.captures == 3


def test_a_failed_capture_warns_once_and_runs_eagerly():
    recorder, loop = Recorder(RuntimeError("operation not permitted when stream is capturing\nmore")), Loop()
    kept, given = Graphs(recorder), torch.randn(5)
    check(kept(loop, given), given)
    with pytest.warns(CaptureWarning, match="runs eagerly: operation not permitted when stream is capturing "):
        check(kept(loop, given), given)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for size in (5, 6, 6):
            given = torch.randn(size)
            check(kept(loop, given), given)
    assert recorder.captures == 1
    assert kept.why_eager == "operation not permitted when stream is capturing"


@pytest.mark.parametrize(
    ("loop", "why"),
    [
        (lambda x: x * x.sum().item(), "aten._local_scalar_dense.default reads a value"),
        (lambda x: x if x.equal(x) else -x, "aten.equal.default reads a value"),
        (lambda x: x[x > 0], "aten.index.Tensor has as many results as a mask has entries"),
        (lambda x: x.nonzero(), "aten.nonzero.default has a shape that depends on values"),
        (lambda x: x[torch.tensor([1, 0])] * torch.tensor(2.0), None),
        (lambda x: x.to("meta"), "aten._to_copy.default touches cpu and meta"),
    ],
)
def test_what_cannot_be_captured_is_never_tried(loop, why):
    recorder, given, calls = Recorder(), torch.randn(5), []
    kept = Graphs(recorder)

    def run(given):
        calls.append(loop(given))
        return computed(given)

    with pytest.warns(CaptureWarning, match=re.escape(f"runs eagerly: {why} (")) if why else nullcontext():
        check(kept(run, given), given)
    assert kept.why_eager == why
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(2):
            check(kept(run, given), given)
    assert recorder.captures == (why is None)
    assert len(calls) == (3 if why else 2)


def test_other_errors_are_not_swallowed():
    kept = Graphs(Recorder(ValueError("mine")))
    kept(Loop(), torch.ones(2))
    with pytest.raises(ValueError, match="mine"):
        kept(Loop(), torch.ones(2))


def test_threads_take_turns():
    kept, inputs, wrong = Graphs(Recorder(seconds=0.001)), torch.randn(8, 1000), []

    def work(i):
        for _ in range(10):
            if not torch.equal(kept(Loop(), inputs[i]).to_cpu()["double"], 2 * inputs[i]):
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not wrong


def test_graphs_go_with_their_owner():
    kept = Graphs(Recorder())
    for _ in range(3):
        kept(Loop(), torch.ones(3))
    static = weakref.ref(next(iter(kept._captured.values())))
    del kept
    gc.collect()
    assert static() is None


def test_one_copy_brings_all_types_back():
    tensors = {
        "floats": torch.randn(2, 3),
        "booleans": torch.tensor([True, False, True]),
        "integers": torch.arange(5).view(5, 1),
        "nothing": torch.empty(0, 4),
        "doubles": torch.randn(4, 2, dtype=torch.float64).t(),
    }
    copies = Bundle.of(tensors).clone().to_cpu()
    assert copies.keys() == tensors.keys()
    for name, tensor in tensors.items():
        copy = copies[name]
        assert copy.dtype == tensor.dtype
        assert torch.equal(copy, tensor)
        assert tensor.numel() == 0 or copy.data_ptr() != tensor.data_ptr()
