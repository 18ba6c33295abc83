"""One whole image: the Tuner against the published algorithm in plain PyTorch, from a photograph and from given views.

The cases are those of ``tpt-fast bench --model``, each row a test of its own. ``--all-models`` runs the other towers
and numbers of classes too; the published algorithm is left out where its graph does not fit in memory. On a GPU both
also run in fp16, the published one by autocast.

``python benchmarks/bench_tune.py PICTURE`` draws where the time of a photograph goes, from the rows that ``--rows`` has
kept.
"""

import sys
from functools import lru_cache
from time import perf_counter

import kept
import pytest
from timing import DEVICE

from tpt_fast.bench import picture, rows
from tpt_fast.bench.agreement import compare
from tpt_fast.bench.case import MODES, STARTS, Case, RandomModel
from tpt_fast.bench.peak import Peak
from tpt_fast.bench.rates import matrix_rate

DEFAULT = [("ViT-B-16", classes) for classes in ((10, 1000) if DEVICE.type == "cuda" else (200,))]
CASES = [(name, classes) for name in ("RN50", "ViT-B-32", "ViT-B-16", "ViT-L-14") for classes in (10, 200, 1000)]
PRECISIONS = ["fp32", "fp16"] if DEVICE.type == "cuda" else ["fp32"]
IMAGES = 4  # of a batch or a stream
SECONDS = 240  # the calls of a case that are timed take about so long together, where one does not take longer


@pytest.fixture(autouse=True)
def _asked_for(request, name, classes):
    if (name, classes) not in DEFAULT and not request.config.getoption("--all-models"):
        pytest.skip("with --all-models")


@lru_cache(maxsize=1)
def random_model(name):
    return RandomModel.of(name, DEVICE)


@lru_cache(maxsize=1)
def prepared(name, classes, precision="fp32"):
    """The last case only."""
    return Case(random_model(name), classes, precision)


def timed(benchmark, case, what, backend, run, rounds, images=1):
    """Time up to ``rounds`` calls of ``run``, after one that tells how far memory rises; returns what it returns."""
    peak, begun = Peak(case.device), perf_counter()
    result = peak.of(run)
    fit = int(SECONDS / (perf_counter() - begun))
    benchmark.extra_info.update(op="tune", case=case.title(what), backend=backend, peak_mb=peak.mb)
    benchmark.pedantic(run, rounds=max(1, min(rounds, fit)))
    if benchmark.stats:
        benchmark.extra_info["images_per_s"] = rows.digits(images / benchmark.stats.stats.median)
    return result


@pytest.mark.parametrize("backend", ["tpt_fast", "published"])
@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(("name", "classes"), CASES)
def test_tune(benchmark, name, classes, start, backend, precision):
    case = prepared(name, classes, precision)
    if backend == "published":
        if reason := case.unpublished():
            pytest.skip(f"published: {reason}")
        want = timed(benchmark, case, start, backend, case.published(start), 3)
        differences = compare(case.ours(start)(), want, precision)
        benchmark.extra_info["differences"] = {name: rows.digits(value) for name, value in differences.items()}
        return
    if DEVICE.type == "cuda":  # the second call of a shape captures its graph
        case.ours(start)()
    rate = matrix_rate(DEVICE, case.dtype)
    timed(benchmark, case, start, backend, case.ours(start), 7)
    rate = max(rate, matrix_rate(DEVICE, case.dtype))
    if benchmark.stats:
        benchmark.extra_info.update(case.facts(start, benchmark.stats.stats.median, rate))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("name", "classes"), CASES)
def test_many(benchmark, name, classes, mode):
    """Images a second; the photographs differ in size."""
    case = prepared(name, classes)
    run = case.many(mode, IMAGES)
    if DEVICE.type == "cuda":
        run()
    results = timed(benchmark, case, f"{mode} of {IMAGES}", "tpt_fast", run, 3, IMAGES)
    assert [result.status for result in results] == ["tuned"] * IMAGES


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit(f"usage: python {sys.argv[0]} PICTURE")
    if not (found := rows.read(kept.path("tune"))):
        raise SystemExit("no rows: run `pytest benchmarks/bench_tune.py --rows` first")
    found = [row for row in found if STARTS[0] in row["case"]]
    picture.draw(sorted(found, key=lambda row: kept.by_numbers(row["case"])), sys.argv[1])
