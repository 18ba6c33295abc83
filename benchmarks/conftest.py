"""``pytest benchmarks``: times, ratios to the peers of the same run and, with ``--rows``, rows in results/.

A benchmark names itself by ``benchmark.extra_info``: op, case, backend; one that makes its rows itself gives them to
the fixture ``keep``. Within a case every other backend is a peer.
"""

import signal
from collections import defaultdict

import kept
import pytest

from tpt_fast.bench import rates, rows


def pytest_addoption(parser):
    parser.addoption("--rows", action="store_true", help="keep the measured rows in benchmarks/results/")
    parser.addoption("--text-sizes", action="store_true", help="bench_text: 100 to 10,000 classes")
    parser.addoption("--all-models", action="store_true", help="bench_tune: every tower and number of classes")


def pytest_configure():
    rates.full_float32()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # out of time: what was measured until then is kept


MADE = pytest.StashKey[list[rows.Row]]()


@pytest.fixture
def keep(request):
    return request.config.stash.setdefault(MADE, []).extend


def pytest_terminal_summary(terminalreporter, config):
    """Print each case's ratios, and keep the rows if asked to."""
    session = getattr(config, "_benchmarksession", None)
    cases = defaultdict(list)
    for row in config.stash.get(MADE, []):
        cases[row["op"], row["case"]].append(row)
    for bench in getattr(session, "benchmarks", []):
        info = dict(bench.extra_info)
        if {"op", "case", "backend"} <= info.keys() and bench.stats.data and not bench.has_error:
            cases[info["op"], info["case"]].append(rows.row(seconds=bench.stats.sorted_data, **info))
    by_op = defaultdict(list)
    for (op, case), found in cases.items():
        rows.add_ratios(found)
        terminalreporter.section(f"{op} {case}", "-")
        for r in sorted(found, key=lambda r: r["median"]):
            terminalreporter.write_line(f"{r['backend']:36} {1e3 * r['median']:10.3f} ms  x {r.get('ratio', '-')}")
        by_op[op] += found
    if config.getoption("--rows"):
        for op, found in by_op.items():
            rows.write(kept.path(op), found)
            terminalreporter.write_line(f"rows: {kept.path(op)}")
