"""Runs of several processes, and runs that are killed: the rows of one process that was left alone, to the bit."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from eval_sets import jpegs

from tpt_fast import demo
from tpt_fast.evaluation import rows

pytestmark = pytest.mark.slow
IMAGES = 40
ONE = [sys.executable, "-m", "tpt_fast"]
TWO = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "tpt_fast"]
WHAT = ["--method", "tpt,zero", "--views", "8", "--rho", "0.3", "--seeds", "0,7"]


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    """A folder for each class."""
    top = tmp_path_factory.mktemp("photos")
    for i, jpeg in enumerate(jpegs(IMAGES)):
        folder = top / [*demo.PHOTOS.values()][i % len(demo.PHOTOS)]
        folder.mkdir(exist_ok=True)
        (folder / f"{i:03}.jpg").write_bytes(jpeg)
    (top / "bee" / "broken.jpg").write_bytes(b"no image")
    return top


def start(program, photos, out, *more):
    command = [*program, "eval", str(photos), "--out", str(out), *WHAT, "--every", "0", *more]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True)


def finish(process, code):
    output, _ = process.communicate(timeout=300)
    assert process.returncode == code, output.decode()


def folder_of(out: Path) -> Path:
    return next(path.parent for path in out.glob("*/set.json")) / "rows"


def table(out):
    """As text, for NaN is not itself."""
    tables = [each.drop_columns([*rows.OF_THE_RUN]) for each in rows.merged(folder_of(out))]
    return [str(row) for each in tables for row in each.to_pylist()]


@pytest.fixture(scope="module")
def alone(photos, tmp_path_factory):
    out = tmp_path_factory.mktemp("alone")
    finish(start(ONE, photos, out), 1)  # an image is broken
    found = table(out)
    assert len(found) == (IMAGES + 1) * 3 * 2
    return found


def wait_for_parts(out, count):
    end = time.monotonic() + 240
    while len([*out.glob("*/rows/part-*")]) < count:
        assert time.monotonic() < end
        time.sleep(0.02)


def workers_of(pid: int) -> list[int]:
    text = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    return [int(each) for each in text.split()]


def test_two_processes_one_killed_and_resumed(photos, alone, tmp_path):
    process = start(TWO, photos, tmp_path)
    wait_for_parts(tmp_path, 6)
    os.kill(workers_of(process.pid)[-1], signal.SIGKILL)
    finish(process, 1)
    there = rows.done(folder_of(tmp_path), "tpt", 0, IMAGES + 1).sum()
    assert 0 < there < IMAGES + 1
    finish(start(TWO, photos, tmp_path), 1)
    assert table(tmp_path) == alone


def test_two_processes_begin_what_one_ends_and_the_other_way_round(photos, alone, tmp_path):
    for first, then in ((TWO, ONE), (ONE, TWO)):
        out = tmp_path / str(len(first))
        process = start(first, photos, out, "--features", str(tmp_path / "features"))
        wait_for_parts(out, 5)
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        finish(start(then, photos, out, "--features", str(tmp_path / "features")), 1)
        assert table(out) == alone


def test_killed_at_three_random_places(photos, alone, tmp_path):
    draw = random.Random(0)
    for count in sorted(draw.sample(range(2, 60), 3)):
        process = start(ONE, photos, tmp_path)
        wait_for_parts(tmp_path, count)
        process.kill()
        process.communicate()
    finish(start(ONE, photos, tmp_path), 1)
    assert table(tmp_path) == alone
