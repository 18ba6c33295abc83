"""The notebook of the documentation runs from top to bottom, in a kernel of its own that reaches no network."""

import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from tpt_fast import demo

TOUR = Path(__file__).resolve().parent.parent / "docs" / "tour.ipynb"
OFFLINE = """
import socket

def refuse(*_, **__):
    raise OSError("the notebook went online")

socket.getaddrinfo = refuse
"""


@pytest.fixture
def tour():
    if not TOUR.is_file():
        pytest.skip("there is no documentation here")
    return nbformat.read(TOUR, as_version=4)


def test_it_runs(tour, tmp_path, monkeypatch):
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    monkeypatch.delenv("MPLBACKEND", raising=False)
    tour.cells.insert(0, nbformat.v4.new_code_cell(OFFLINE))
    NotebookClient(tour, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}).execute()
    _, _, classify, plot, stream, methods, own, learned = (c.outputs for c in tour.cells if c.cell_type == "code")

    def printed(outputs):
        return "".join(each.text for each in outputs if each.output_type == "stream" and each.name == "stdout")

    assert "before tuning: mountain\nafter tuning:  dam\n" in printed(classify)
    assert "image/png" in plot[0].data
    truths = list(demo.PHOTOS.values())
    assert [line[:16].rstrip() for line in printed(stream).splitlines()] == truths
    named = [line.split()[0] for line in printed(methods).splitlines()]
    assert named == ["tpt", "zero_shot", "ensemble", "zero", "mta"]
    before, after = map(float, re.search(r"objective (\S+) -> (\S+)", printed(own)).groups())
    assert after < before
    assert printed(learned).strip().split(", ") == truths


def test_it_is_kept_without_outputs(tour):
    kept = [cell for cell in tour.cells if cell.get("outputs") or cell.get("execution_count")]
    assert not kept, f"run: jupyter nbconvert --clear-output --inplace {TOUR}"


def test_its_links_lead_somewhere(tour):
    text = "".join(cell.source for cell in tour.cells if cell.cell_type == "markdown")
    links = re.findall(r"\]\(([^)]+)\)", text)
    assert len(links) > 3
    assert [link for link in links if not (TOUR.parent / link).is_file()] == []
