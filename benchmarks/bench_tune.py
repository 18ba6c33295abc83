"""One whole image: the Tuner against the published algorithm in plain PyTorch, from a photograph and from given views.

These are the rows of ``tpt-fast bench --model``, each case a test of its own; the two take turns. ``--all-models`` runs
the other towers and numbers of classes too; the published algorithm is left out where its graph does not fit in memory.
On a GPU both also run in fp16, the published one by autocast.

``python benchmarks/bench_tune.py PICTURE`` draws where the time of a photograph goes, from the rows that ``--rows`` has
kept.
"""

import sys
from functools import lru_cache

import kept
import pytest
from timing import DEVICE

from tpt_fast._machine import cpu_flags
from tpt_fast.bench import picture, rows
from tpt_fast.bench.case import MODES, STARTS, Case, RandomModel
from tpt_fast.bench.measure import many_images, one_image
from tpt_fast.bench.turns import take_turns

DEFAULT = [("ViT-B-16", classes) for classes in ((10, 1000) if DEVICE.type == "cuda" else (200,))]
CASES = [(name, classes) for name in ("RN50", "ViT-B-32", "ViT-B-16", "ViT-L-14") for classes in (10, 200, 1000)]
PRECISIONS = ["fp32", "fp16"] if DEVICE.type == "cuda" else ["fp32"]
IMAGES = 4  # of a batch or a stream
SECONDS = 120  # the timed calls of a row take about so long together, where one does not take longer


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


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(("name", "classes"), CASES)
def test_one_image(keep, name, classes, start, precision):
    case = prepared(name, classes, precision)
    keep(one_image(case, start, repeats=7, seconds=SECONDS, published=case.unpublished() is None))


@pytest.mark.skipif("avx512bf16" not in cpu_flags(), reason="a CPU without products in bfloat16")
@pytest.mark.parametrize(("name", "classes"), CASES)
def test_bfloat16(keep, name, classes):
    """One photograph in bfloat16 against the same in float32."""
    case, plain = (Case(random_model(name), classes, precision) for precision in ("bf16", "fp32"))
    runs = {"tpt_fast": case.ours(STARTS[0]), "tpt_fast, fp32": plain.ours(STARTS[0])}
    for run in runs.values():
        run()
    taken = take_turns(runs, repeats=7, seconds=SECONDS)
    found = [rows.row("tune", case.title(STARTS[0]), backend, seconds) for backend, seconds in taken.items()]
    rows.add_ratios(found)
    keep(found)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("name", "classes"), CASES)
def test_many_images(keep, name, classes, mode):
    """Images a second; the photographs differ in size."""
    keep(many_images(prepared(name, classes), mode, IMAGES, repeats=3, seconds=SECONDS))


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit(f"usage: python {sys.argv[0]} PICTURE")
    if not (found := rows.read(kept.path("tune"))):
        raise SystemExit("no rows: run `pytest benchmarks/bench_tune.py --rows` first")
    found = [row for row in found if STARTS[0] in row["case"]]
    picture.draw(sorted(found, key=lambda row: kept.by_numbers(row["case"])), sys.argv[1])
