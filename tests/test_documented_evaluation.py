"""The code of docs/how-to/evaluate.md runs as it stands there, and its table has the columns of a row."""

import re

import pytest
from eval_sets import jpegs
from test_documented_methods import HOW_TO, blocks, given  # noqa: F401

from tpt_fast import demo
from tpt_fast.evaluation import rows


def test_the_page(given, tmp_path, capsys):  # noqa: F811
    pytest.importorskip("tpt_fast.evaluation.sets")
    for i, jpeg in enumerate(jpegs(6)):
        folder = tmp_path / "photos" / [*demo.PHOTOS.values()][i % 3]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{i}.jpg").write_bytes(jpeg)
    one_image, python, spec = blocks("evaluate.md")
    exec(one_image, given)
    assert given["result"].label in given["names"]
    exec(python, given)
    assert [line.split(":")[0] for line in capsys.readouterr().out.splitlines()] == ["zero_shot", "tpt", "zero"]
    exec(spec, given)
    assert given["spec"].build("cpu").method.name == "tpt"


def test_its_columns():
    if not HOW_TO.is_dir():
        pytest.skip("there is no documentation here")
    cells = re.findall(r"^\| (`.*?) \|", (HOW_TO / "evaluate.md").read_text("utf-8"), re.M)
    assert [name for cell in cells for name in re.findall(r"`(\w+)`", cell)] == rows.SCHEMA.names
