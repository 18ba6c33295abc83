"""What the command line gives: rows, the file of results and going on with it, what a run comes to, how it ends."""

import csv
import json
import os
import re
import signal
import subprocess
import sys
import time
from io import StringIO
from types import SimpleNamespace

import open_clip
import pytest
from command_line import CAT, FEW, one_demo_model, plain_terminal, rows, run, said  # noqa: F401 (fixtures)
from PIL import Image
from rich.console import Console
from rich.table import Table

from tpt_fast.cli import _results_file, _run, _shared, main
from tpt_fast.cli._results_file import COLUMNS, ResultsFile

ESC = "\x1b"


@pytest.fixture
def photos(tmp_path):
    """Four photographs in the folders of two classes, and one that is none."""
    for number, name in enumerate(("cat/1.png", "cat/2.png", "Red_Fox/3.png", "elsewhere/4.png")):
        (tmp_path / "photos" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.open(CAT).resize((40 + number, 30)).save(tmp_path / "photos" / name)
    (tmp_path / "photos" / "cat" / "broken.png").write_text("none")
    return tmp_path / "photos"


CLASSES = ["--classes", "cat,red fox,dog"]


def read(file) -> list[dict]:
    if file.suffix == ".csv":
        return list(csv.DictReader(StringIO(file.read_text())))
    if file.suffix == ".jsonl":
        return [json.loads(line) for line in file.read_text().splitlines()]
    return pytest.importorskip("pyarrow.parquet").read_table(file).to_pylist()


# --- what a run comes to


def test_accuracy_where_folders_have_the_names_of_classes(photos):
    result = run("tune", photos, *CLASSES, "--json", *FEW, code=1)
    found = {os.path.basename(row["file"]): row for row in rows(result)}
    assert [found[name]["target"] for name in ("1.png", "2.png", "3.png")] == ["cat", "cat", "red fox"]
    assert found["4.png"]["target"] is None
    judged = [row for row in found.values() if row["target"] and "label" in row]
    right = sum(row["label"] == row["target"] for row in judged)
    zero_shot = sum(row["zero_shot_label"] == row["target"] for row in judged)
    message = f"accuracy {right / 3:.1%} of 3 images whose folder is a class; zero-shot {zero_shot / 3:.1%}"
    assert message in said(result)
    assert "5 images: 1 failed; 0:00:0" in said(result)


def test_confusions_worst_first():
    summary = _run.Summary()
    for target, label, zero_shot in [("cat", "cat", "dog"), ("cat", "dog", "dog"), ("red fox", "Red_Fox", "red fox")]:
        summary.add({"target": target, "label": label, "zero_shot_label": zero_shot})
    summary.add({"target": "cat", "error": "unreadable"})
    shown = Console(width=100, file=StringIO())
    summary.show(shown)
    lines = [line.split() for line in shown.file.getvalue().splitlines() if line.strip()]
    assert ["cat", "2", "50.0%", "dog", "1"] in lines
    assert lines.index(["cat", "2", "50.0%", "dog", "1"]) < lines.index(["red", "fox", "1", "100.0%"])
    assert "accuracy 66.7% of 3 images whose folder is a class; zero-shot 33.3%" in shown.file.getvalue()


def test_an_estimate_from_the_first_image_on(capsys):
    column = _shared.TimeLeft()
    assert str(column.render(SimpleNamespace(completed=0, total=5, elapsed=1.0))) == "-:--:-- left"
    assert str(column.render(SimpleNamespace(completed=1, total=3601, elapsed=1.0))) == "1:00:00 left"
    _run._estimate(2.0, 61)
    assert "the first of 61 images took 2 s: 0:02:00 left at this rate" in capsys.readouterr().err


# --- a file of results


@pytest.mark.parametrize("ending", ["csv", "jsonl", "parquet"])
def test_a_file_of_results(photos, ending):
    if ending == "parquet":
        pytest.importorskip("pyarrow")
    file = photos.parent / f"results.{ending}"
    result = run("tune", photos, *CLASSES, "--json", "--out", file, *FEW, code=1)
    kept = read(file)
    assert [row["file"] for row in kept] == [row["file"] for row in rows(result)]
    for row, printed in zip(kept, rows(result), strict=True):
        for name in ("label", "target", "error", "status"):
            assert (row.get(name) or None) == printed.get(name)
        if "prob" in printed:
            assert float(row["prob"]) == printed["prob"]
            top = row["top"] if ending == "jsonl" else json.loads(row["top"])
            assert top == printed["top"]
    if ending != "jsonl":
        assert list(kept[0]) == list(COLUMNS)
    assert sorted(each.name for each in photos.parent.iterdir()) == [
        "photos",
        f"results.{ending}",
        f"results.{ending}.options.json",
    ]


@pytest.mark.parametrize("ending", ["csv", "jsonl", "parquet"])
def test_a_run_goes_on_where_another_ended(photos, ending, monkeypatch):
    if ending == "parquet":
        pytest.importorskip("pyarrow")
    file = photos.parent / f"results.{ending}"
    arguments = ["tune", photos, *CLASSES, "--out", file, "--resume", *FEW]
    write, written = ResultsFile.write, []

    def interrupted(self, row):
        if len(written) == 2:
            raise KeyboardInterrupt
        write(self, row)
        written.append(row["file"])

    with monkeypatch.context() as patch:
        patch.setattr(ResultsFile, "write", interrupted)
        stopped = run(*arguments, code=130)
    assert f"stopped after 2 of 5 images; their rows are in {file}: --resume goes on" in said(stopped)
    assert [row["file"] for row in read(file)] == written
    assert f"{file} is there already: add --resume" in said(run(*(a for a in arguments if a != "--resume"), code=2))
    again = run(*arguments, code=1)
    assert f"{file} has 2 of 5 images already" in said(again)
    assert "accuracy" in again.stdout
    assert "of 3 images whose folder is a class" in again.stdout  # those of the first run too
    assert [os.path.basename(row["file"]) for row in read(file)] == ["3.png", "1.png", "2.png", "broken.png", "4.png"]
    whole = read(file)
    assert f"{file} has 5 of 5 images already" in said(run(*arguments, code=1))
    assert read(file) == whole


def test_a_killed_run_leaves_its_rows(photos):
    """Every row is in the file before the next image is asked for, half a row is dropped."""
    file = photos.parent / "results.csv"
    run("tune", photos / "cat", *CLASSES, "--out", file, *FEW, code=1)
    whole = file.read_bytes()
    file.write_bytes(whole[:-20])
    result = run("tune", photos / "cat", *CLASSES, "--out", file, "--resume", *FEW, code=1)
    assert "dropped half a row" in said(result)
    assert [row["file"] for row in read(file)] == [row["file"] for row in csv.DictReader(StringIO(whole.decode()))]


def test_rows_are_on_the_disk_one_by_one(tmp_path, monkeypatch):
    synced = []
    fsync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda opened: (fsync(opened), synced.append((tmp_path / "a.jsonl").read_text())))
    file = ResultsFile(tmp_path / "a.jsonl", {}, resume=False)
    synced.clear()
    for name in "ab":
        file.write({"file": name})
    assert synced == ['{"file": "a"}\n', '{"file": "a"}\n{"file": "b"}\n']


def test_parquet_in_row_groups(tmp_path, monkeypatch):
    parquet = pytest.importorskip("pyarrow.parquet")
    monkeypatch.setattr(_results_file, "_GROUP", 2)
    for begin in (0, 3):
        file = ResultsFile(tmp_path / "a.parquet", {}, resume=True)
        for number in range(begin, begin + 3):
            file.write({"file": f"{number}.png", "prob": 0.5, "top": [{"label": "cat"}]})
        assert (tmp_path / "a.parquet.part").read_text().count("\n") == 3
        file.close()
    assert [row["file"] for row in read(tmp_path / "a.parquet")] == [f"{number}.png" for number in range(6)]
    assert parquet.ParquetFile(tmp_path / "a.parquet").num_row_groups == 3
    assert not (tmp_path / "a.parquet.part").exists()


def test_parquet_without_pyarrow(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert "tpt_fast[parquet]" in said(run("tune", CAT, "--out", tmp_path / "a.parquet", *FEW, code=3))
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (["--seed", 1], "was made with --seed 0, not 1"),
        (["--top", 3], "was made with top 5, not 3"),
        (["--method", "official"], "official' depends on the images before it"),
        (["--classes", "cat,dog"], "was made with classes whose number 1 is 'red fox', not 'dog'"),
        (["--classes", "cat,red fox"], "was made with 3 classes, not 2"),
    ],
)
def test_a_file_made_with_something_else_is_refused_by_name(tmp_path, changed, message):
    file = tmp_path / "a.csv"
    run("tune", CAT, *CLASSES, "--out", file, *FEW)
    before = file.read_bytes()
    arguments = [*FEW, "--out", file, "--resume", *(changed if "--classes" in changed else [*CLASSES, *changed])]
    assert message in said(run("tune", CAT, *arguments, code=2))
    assert file.read_bytes() == before


def test_a_file_of_something_else_is_left_alone(tmp_path):
    for name, text in (("a.csv", "x,y\n1,2\n"), ("a.jsonl", "milk\n"), ("b.jsonl", "[]\n")):
        file = tmp_path / name
        file.write_text(text)
        arguments = ["tune", CAT, "--out", file, "--resume", *FEW]
        assert "options.json, which says what" in said(run(*arguments, code=2))
        run("tune", CAT, "--out", tmp_path / f"good-{name}", *FEW)
        os.replace(tmp_path / f"good-{name}.options.json", f"{file}.options.json")
        assert "holds something else than rows of results" in said(run(*arguments, code=2))
        assert file.read_text() == text


def test_bad_files_of_results(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    os.mkfifo("pipe.csv")
    for name, message in (
        ("a.txt", "--out: a.txt ends in none of .csv, .jsonl, .parquet"),
        ("absent/a.csv", "--out: absent/a.csv cannot be written: No such file"),
        ("pipe.csv", "--out: pipe.csv is no regular file"),
    ):
        assert message in said(run("tune", CAT, "--out", name, *FEW, code=2))
    assert os.listdir(tmp_path) == ["pipe.csv"]


def test_one_run_at_a_time(tmp_path):
    file = ResultsFile(tmp_path / "a.csv", {}, resume=False)
    assert "another run is writing" in said(run("tune", CAT, "--out", tmp_path / "a.csv", "--resume", *FEW, code=2))
    file.close()


def test_a_full_disk_under_the_file_of_results(photos, monkeypatch):
    file, write = photos.parent / "a.jsonl", ResultsFile._append

    def full(self, line):
        if '"2.png' in line or "2.png" in line:
            self._file.write(line[:9].encode())
            self._file.truncate(self._size() - 9)
            raise OSError(28, "No space left on device")
        write(self, line)

    monkeypatch.setattr(ResultsFile, "_append", full)
    result = run("tune", photos, *CLASSES, "--out", file, *FEW, code=3)
    assert f"{file} cannot be written: No space left on device" in said(result)
    assert len(read(file)) == 2


def test_odd_names_are_one_line_of_utf8(tmp_path):
    names = ["a\nb.png", "lat\udce9.png", 'quo"te,.png', f"{ESC}[31m.png"]
    for name in names:
        Image.new("RGB", (9, 9)).save(tmp_path / name)
    for ending in ("csv", "jsonl"):
        file = tmp_path / f"results.{ending}"
        run("tune", tmp_path, "--out", file, *FEW)
        text = file.read_bytes().decode("utf-8")
        assert ESC not in text
        assert text.count("\n") == len(names) + (ending == "csv")
        assert f"has {len(names)} of {len(names)} images" in said(
            run("tune", tmp_path, "--out", file, "--resume", *FEW)
        )


# --- terminals, pipes and signals


def test_escapes_and_markup_are_shown_and_not_obeyed(tmp_path):
    odd = tmp_path / f"{ESC}]0;title\a[bold red]\u202egnp.png"
    Image.new("RGB", (9, 9)).save(odd)
    (tmp_path / f"{ESC}[2J.txt").touch()
    (tmp_path / f"broken{ESC}[2J.png").write_text("none")
    shown = run("tune", tmp_path, "--classes", f"cat{ESC}[2J,[red]dog", *FEW, code=1)
    bad = run("tune", tmp_path / "absent", "--model", f"ViT{ESC}[2J", "--classes", "a,b", code=2)
    unknown = run("tune", f"--{ESC}[2J", code=2)
    picture = run("tune", odd, "--plot", f"{ESC}[2J.txt", code=2)
    for result in (shown, bad, unknown, picture):
        assert ESC not in result.output
        assert "\a" not in result.output
        assert "\u202e" not in result.output
    assert r"\x1b]0;title\x07[bold red]\u202egnp.png" in shown.stdout
    assert r"broken\x1b[2J.png" in shown.stdout


def test_a_pipe_folds_nothing(monkeypatch, tmp_path):
    monkeypatch.setenv("COLUMNS", "40")
    deep = tmp_path / ("long" * 30) / ("path" * 30)
    deep.mkdir(parents=True)
    Image.new("RGB", (9, 9)).save(deep / "a.png")
    assert any(str(deep / "a.png") in line for line in run("tune", deep, *FEW).stdout.splitlines())


@pytest.mark.parametrize("width", [20, 70])
def test_a_narrow_terminal_loses_nothing(width):
    class Terminal(StringIO):
        def isatty(self):
            return True

    table = Table("file", "label", "prob", "zero-shot", "prob", "entropy", "ms")
    for column in table.columns:
        column.overflow = "fold"
    table.add_row("folder/photograph.jpg", "label", "98.1%", "shot", "45.6%", "1.234 → 0.123", "61")
    console = Console(width=width, height=9, file=Terminal(), force_terminal=True, color_system=None)
    _shared.print_table(table, console)
    text = re.sub(r"[^\w./%]", "", console.file.getvalue()) if width < 60 else console.file.getvalue()
    for value in ("98.1%", "45.6%", "61"):
        assert value in text
    assert (max(map(len, console.file.getvalue().splitlines())) > width) == (width < 60)


def without_a_reader(*arguments):
    """What a command says on stderr, in a process of its own, when nobody reads its stdout any more."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tpt_fast", *map(str, arguments)]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process.stdout.close()
    message = process.stderr.read()
    assert process.wait() == 3, message
    assert "error: standard output was closed by its reader: results are lost" in message
    assert "Traceback" not in message
    return message


def test_a_reader_that_goes_is_told_of(photos):
    """``--json | head -1``; and tables, of which rich has a word too."""
    assert "stopped after 1 of 5 images" in without_a_reader("tune", photos, *CLASSES, "--json", *FEW)
    without_a_reader("methods")
    without_a_reader("tune", CAT, *FEW)


def test_a_closed_stdout(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(sys, "stdout", None)
    for arguments, code in ((["tune", CAT, "--json"], 3), (["doctor"], 3), (["demo"], 3), (["bench-demo"], 3)):
        assert call(monkeypatch, *arguments) == code
        assert "standard output is closed: the results have no place to go" in capsys.readouterr().err
    assert call(monkeypatch, "tune", CAT, "--out", tmp_path / "a.jsonl", *FEW) == 0
    assert len(read(tmp_path / "a.jsonl")) == 1


def call(monkeypatch, *arguments) -> int:
    monkeypatch.setattr(sys, "argv", ["tpt-fast", *map(str, arguments)])
    with pytest.raises(SystemExit) as end:
        main()
    return end.value.code


def test_sigterm_shows_what_is_done(monkeypatch, photos, capsys):
    row, made = _run._row, []

    def then_terminated(*arguments):
        made.append(arguments)
        if len(made) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(5)
        return row(*arguments)

    monkeypatch.setattr(_run, "_row", then_terminated)
    before = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        assert call(monkeypatch, "tune", photos, *CLASSES, *FEW) == 128 + signal.SIGTERM
    finally:
        signal.signal(signal.SIGTERM, before)
    shown = capsys.readouterr()
    assert "1.png" in shown.out
    assert "stopped after 2 of 5 images" in shown.err


def test_warnings_of_an_image_name_it(tmp_path):
    import numpy as np

    Image.fromarray(np.arange(3000, dtype=np.uint16).reshape(60, 50) * 20).save(tmp_path / "deep.png")
    assert f"warning: image: {tmp_path / 'deep.png'} holds values from 0 to 59980" in said(run("tune", tmp_path, *FEW))


# --- random weights


def test_random_weights_by_saying_so(tmp_path):
    vision = {"image_size": 32, "layers": 1, "width": 64, "patch_size": 16, "head_width": 32}
    text = {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 1}
    file = tmp_path / "tiny-random.json"
    file.write_text(json.dumps({"embed_dim": 32, "vision_cfg": vision, "text_cfg": text}))
    open_clip.add_model_config(file)
    arguments = ["tune", CAT, "--model", "tiny-random", "--classes", "cat,dog", *FEW]
    assert "needs weights" in (refused := said(run(*arguments, code=2)))
    assert "'none' for random ones" in refused
    first, again = (run(*arguments, "--pretrained", "none", "--json") for _ in range(2))
    assert "tiny-random with random weights: its labels mean nothing" in said(first)
    assert rows(first)[0]["prob"] == rows(again)[0]["prob"]
    assert "open_clip has no model" in said(
        run("tune", CAT, "--model", "tinny", "--pretrained", "none", *CLASSES, code=2)
    )
