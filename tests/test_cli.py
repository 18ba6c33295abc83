"""The command line: results, JSON, exit codes (0 fine, 1 an image failed, 2 bad usage, 3 the environment)."""

import json
import os
import subprocess
import sys
import warnings
from io import BytesIO, StringIO, TextIOWrapper

import pytest
import rich.markup
import torch
import typer
from command_line import CAT, FEW, plain_terminal, rows, run, said  # noqa: F401 (a fixture)
from PIL import Image
from rich.console import Console
from typer.testing import CliRunner

import tpt_fast
from tpt_fast import demo
from tpt_fast.cli import _models, app, main
from tpt_fast.cli.bench_demo import _table as bench_table
from tpt_fast.cli.doctor import _describe
from tpt_fast.demo import clip, weights
from tpt_fast.extension import build, load, toolkit


def untimed(records: list[dict]) -> list[dict]:
    return [{key: value for key, value in record.items() if key != "ms"} for record in records]


# --- starting


def test_help_comes_without_torch():
    code = "import sys, tpt_fast.cli as c; c.app(['tune', '--help'], standalone_mode=False)"
    code += "; assert 'torch' not in sys.modules"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "--classes-file" in result.stdout


def test_help_loses_no_word():
    """rich takes brackets around small letters for markup, and leaves them out."""
    for name, command in typer.main.get_command(app).commands.items():
        for text in (command.help, *(getattr(each, "help", None) for each in command.params)):
            assert text is None or rich.markup.render(text).plain == text, name


def test_as_a_program(tmp_path):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-m", "tpt_fast", "tune", str(CAT), str(tmp_path / "absent.jpg"), "--json", *FEW]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 1, result.stderr
    first, second = map(json.loads, result.stdout.splitlines())
    assert first["label"] in demo.CLASSNAMES
    assert second["error"] == f"image: cannot read {tmp_path / 'absent.jpg'}: No such file or directory"
    assert "1 of 2 images failed" in result.stderr


def test_version():
    assert run("--version").stdout.strip() == f"tpt-fast {tpt_fast.__version__}"


def test_no_command_shows_help():
    result = CliRunner().invoke(app, [])
    assert result.exit_code == 2
    assert "doctor" in result.output


@pytest.fixture
def program(monkeypatch):
    """The entry point, which writes to ``stdout``; returns the exit code."""

    def program(stdout, *arguments):
        monkeypatch.setattr(sys, "argv", ["tpt-fast", *map(str, arguments)])
        monkeypatch.setattr(sys, "stdout", stdout)
        with pytest.raises(SystemExit) as end:
            main()
        return end.value.code

    return program


@pytest.mark.parametrize("stdout", [TextIOWrapper(BytesIO()), None], ids=["open", "closed"])
def test_the_entry_point_exists(program, stdout):
    assert program(stdout, "--version") == 0


def test_an_encoding_without_every_letter(program):
    stdout = TextIOWrapper(BytesIO(), "latin-1")
    assert program(stdout, "tune", CAT, "lat\udce9.jpg", *FEW) == 1
    shown = stdout.buffer.getvalue().decode("latin-1")
    assert "\\u2192" in shown
    assert "lat\\udce9.jpg" in shown


@pytest.mark.parametrize("arguments", [["--version"], ["tune", "absent.jpg"], ["tune", "absent.jpg", "--json"]])
def test_a_full_disk_under_stdout(program, capsys, arguments):
    with open("/dev/full", "w") as stdout:
        assert program(stdout, *arguments) == 3
    assert capsys.readouterr().err.strip().splitlines() == ["error: [Errno 28] No space left on device"]


# --- tune


def test_json_is_what_the_library_says():
    (row,) = rows(run("tune", CAT, "--json", "--classes", "cat, dog,red_fox", "--seed", 3, "--lr", 0.02, *FEW))
    loaded = demo.load()
    result = tpt_fast.tune(loaded.model, CAT, ["cat", "dog", "red_fox"], n_views=6, rho=0.4, seed=3, lr=0.02)
    assert (row["file"], row["label"], row["index"]) == (str(CAT), result.label, result.index)
    assert row["prob"] == pytest.approx(result.probs.max().item(), abs=1e-6)
    assert row["zero_shot_prob"] == pytest.approx(result.zero_shot_probs.max().item(), abs=1e-6)
    assert (row["entropy_before"], row["entropy_after"]) == pytest.approx((result.loss, result.loss_after), abs=1e-6)
    assert [p["label"] for p in row["top"]] == [p.label for p in result.topk(5)]
    assert row["status"] == "tuned"
    assert row["ms"] > 0


def test_table():
    result = run("tune", CAT, "--classes", "cat,dog", *FEW)
    assert str(CAT) in result.stdout.replace("\n", "")
    assert "zero-shot" in result.stdout
    assert "→" in result.stdout


def test_a_broken_image_has_its_row_and_the_others_go_on(tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "400")
    broken = tmp_path / "broken [1].jpg"
    broken.write_bytes(CAT.read_bytes()[:5000])
    empty = tmp_path / "empty.png"
    empty.touch()
    unreadable = [empty, tmp_path / "absent.jpg", "long" * 100, "lat\udce9.jpg"]
    first, second, third, fourth, fifth, last = rows(run("tune", broken, CAT, *unreadable, "--json", *FEW, code=1))
    assert "damaged or truncated" in first["error"]
    assert second["label"] in demo.CLASSNAMES
    assert "empty file" in third["error"]
    assert "No such file" in fourth["error"]
    assert "File name too long" in fifth["error"]
    assert last["file"] == "lat\udce9.jpg"
    table = run("tune", broken, CAT, *FEW, code=1).stdout
    assert "broken [1].jpg" in table
    assert "damaged" in table


def test_a_large_photograph_is_no_reason_to_warn(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100_000)
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        run("tune", CAT, *FEW)


def test_strict_official_repeats_itself():
    again = [untimed(rows(run("tune", CAT, "--json", "--strict-official", "--seed", 4, *FEW))) for _ in range(2)]
    assert again[0] == again[1]
    other = untimed(rows(run("tune", CAT, "--json", "--strict-official", "--seed", 5, *FEW)))
    assert other != again[0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "Missing argument"),
        ([""], "IMAGE: expected a file or folder, got ''"),
        ([CAT, "--classes", "cat", "--classes-file", CAT], "not both"),
        ([CAT, "--classes", " , "], "--classes: there are no class names in ' , '"),
        ([CAT, "--classes-file", "/dev/null"], "--classes-file: there are no class names in '/dev/null'"),
        ([CAT, "--classes-file", "absent.txt"], "does not exist"),
        ([CAT, "--classes-file", CAT], "not UTF-8"),
        ([CAT, "--classes", "cat " * 90], "the model takes 77"),
        ([CAT, "--views", "1"], "n_views: expected 2 or more, got 1"),
        ([CAT, "--rho", "2"], "rho: expected a number in"),
        ([CAT, "--steps", "many"], "valid int"),
        ([CAT, "--precision", "fp8"], "precision: expected one of"),
        ([CAT, "--ctx", "absent.pt"], "cannot be read"),
        ([CAT, "--device", "abacus"], "abacus"),
        ([CAT, "--pretrained", "openai"], "it goes with --model"),
        ([CAT, "--model", "ViT-B-32"], "--model needs class names"),
        ([CAT, "--model", "ViT-B-23", "--classes", "a,b", "--pretrained", "openai"], "did you mean"),
        ([CAT, "--model", "ViT-B-32", "--classes", "a,b"], "needs weights"),
        ([CAT, "--model", "ViT-B-32", "--classes", "a,b", "--pretrained", ""], "needs weights"),
        ([CAT, "--model", "ViT-B-32", "--classes", "a,b", "--pretrained", "."], "neither a file nor a tag"),
        ([CAT, "--model", "ViT-B-32", "--classes", "a,b", "--pretrained", "openia"], "neither a file nor a tag"),
        ([CAT, CAT, "--plot", "two.png"], "use --plot-dir"),
        ([CAT, "--plot", "one.pgn"], "one.pgn ends in none of"),
        ([CAT, "--plot", "one.pgf"], "one.pgf ends in none of"),
        ([CAT, "--plot", "absent/one.png"], "--plot: absent/one.png cannot be written: No such file"),
        ([CAT, "--plot", "one.png", "--plot-dir", "new"], "--plot or --plot-dir, not both"),
        ([CAT, "--plot-dir", CAT / "pictures"], "cannot be made"),
        ([CAT, "--plot-dir", "/proc"], "--plot-dir: /proc/cat.png cannot be written: No such file"),
        ([CAT, "--plot-dir", "new", "--classes", "cat " * 90], "the model takes 77"),
    ],
)
def test_bad_usage(arguments, message, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert message in said(run("tune", *arguments, code=2))
    assert os.listdir(tmp_path) == []


def test_plots(tmp_path):
    pytest.importorskip("matplotlib")
    run("tune", CAT, "--plot", tmp_path / "one.png", "--classes", r"cat for $\frac$,cat for $5", *FEW)
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    for folder in "ab":
        Image.new("RGB", (40, 50), "red").save(tmp_path / folder / "same.png")
    run("tune", tmp_path / "a", tmp_path / "b", "--plot-dir", tmp_path / "plots" / "new", *FEW)
    assert sorted(file.name for file in (tmp_path / "plots" / "new").iterdir()) == ["same-2.png", "same.png"]
    with Image.open(tmp_path / "one.png") as picture:
        assert min(picture.size) > 100


def test_no_picture_takes_the_place_of_an_image(tmp_path):
    Image.new("RGB", (40, 50), "red").save(tmp_path / "a.png")
    (tmp_path / "link.png").symlink_to("a.png")
    for arguments in (["--plot-dir", tmp_path], ["--plot", tmp_path / "link.png"]):
        assert "is one of the images" in run("tune", tmp_path / "a.png", *arguments, code=2).stderr


def test_a_picture_that_cannot_be_written_costs_no_result(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")

    def full(*_):
        raise OSError("no space left")

    monkeypatch.setattr(tpt_fast.TuneResult, "plot", full)
    monkeypatch.chdir(tmp_path)
    arguments = ["tune", CAT, "--plot", "one.png", *FEW]
    (row,) = rows(run(*arguments, "--json", code=1))
    assert row["label"] in demo.CLASSNAMES
    assert row["error"] == "one.png cannot be written: no space left"
    table = run(*arguments, code=1).stdout
    assert row["label"] in table
    assert "no space left" in table


# --- problems of the environment


def test_a_plot_without_matplotlib(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert "matplotlib" in run("tune", CAT, "--plot", tmp_path / "one.png", code=3).stderr


def test_no_compiler_where_native_is_wanted(monkeypatch, tmp_path):
    (tmp_path / "csrc").mkdir()
    (tmp_path / "python").mkdir()
    monkeypatch.setattr(build, "source_root", lambda: tmp_path)  # of which there is no build yet
    monkeypatch.setattr(load, "_decided", {})
    monkeypatch.setattr(toolkit, "cxx", no_compiler)
    monkeypatch.setenv("TPT_FAST_BACKEND", "native")
    assert "no C++ compiler" in run("tune", CAT, *FEW, code=3).stderr
    monkeypatch.setenv("TPT_FAST_BACKEND", "fastest")
    assert "TPT_FAST_BACKEND: expected" in run("tune", CAT, *FEW, code=3).stderr
    monkeypatch.setenv("TPT_FAST_BACKEND", "auto")
    assert "the PyTorch reference runs in their place" in run("tune", CAT, *FEW).stderr


def no_compiler():
    raise toolkit.BuildError("no C++ compiler: looked for c++ on the PATH.")


def test_missing_demo_weights(monkeypatch):
    def missing(_model):
        raise FileNotFoundError("model.safetensors")

    monkeypatch.setattr(weights, "load_weights", missing)
    assert "weights are missing from this installation" in run("tune", CAT, code=3).stderr


# --- models of open_clip


@pytest.fixture
def asked(monkeypatch):
    """What open_clip is asked for; it answers with the demo model."""
    import open_clip

    calls = []

    def create_model(name, **options):
        calls.append((name, options["pretrained"], options["force_quick_gelu"]))
        return demo.load().model

    monkeypatch.setattr(open_clip, "create_model", create_model)
    return calls


@pytest.mark.parametrize(
    ("name", "tag", "forced"),
    [
        ("ViT-B-16", "openai", True),
        ("ViT-B-16-quickgelu", "openai", False),
        ("ViT-B-16", "laion2b_s34b_b88k", False),
    ],
)
def test_quick_gelu_follows_the_weights(asked, name, tag, forced):
    result = run("tune", CAT, "--model", name, "--pretrained", tag, "--classes", "cat,dog", *FEW)
    assert asked == [(name, tag, forced)]
    assert ("QuickGELU" in result.stderr) == forced


def test_a_failed_download_is_the_environments_fault(monkeypatch):
    import open_clip

    def create_model(*_, **__):
        raise OSError("no route to host")

    monkeypatch.setattr(open_clip, "create_model", create_model)
    arguments = ["--model", "ViT-B-32", "--pretrained", "openai", "--classes", "a,b"]
    assert "cannot be loaded: no route to host" in run("tune", CAT, *arguments, code=3).stderr


# --- demo, doctor, bench


def test_demo(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    result = run("demo")
    assert all(name in result.stdout for name in demo.PHOTOS)
    said = " ".join(result.stderr.split())
    assert "A small model of 100 everyday things names 8 photographs" in said
    assert "tpt-fast tune PHOTO.jpg --classes cat,dog,horse --model ViT-B-16-quickgelu" in said
    assert (tmp_path / "tpt-fast-demo.png").stat().st_size > 10_000


def test_demo_without_matplotlib(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    result = run("demo", "--json")
    assert [row["file"] for row in rows(result)] == list(demo.PHOTOS)
    assert "pip install matplotlib" in result.stderr
    assert "tpt-fast tune PHOTO.jpg" in result.stderr
    assert list(tmp_path.iterdir()) == []
    run("demo", "--out", tmp_path / "picture.png", code=3)


def test_names_that_the_demo_model_never_saw():
    warned = said(run("tune", CAT, "--classes", "Tabby_cat,horse,dog,espresso", *FEW))
    assert "not 'horse': for such names it answers by chance" in warned
    assert "and not 'm', 'n', 'o' and 1 more:" in said(run("tune", CAT, "--classes", "m,n,o,p,dog", *FEW))
    assert "by chance" not in said(run("tune", CAT, "--classes", ",".join(demo.CLASSNAMES), *FEW))


def test_demo_with_a_bad_picture_name(tmp_path):
    pytest.importorskip("matplotlib")
    assert "ends in none of" in run("demo", "--out", tmp_path / "picture.pgn", code=2).stderr


def test_the_demo_model_is_the_librarys():
    ours, theirs = _models.load_demo(), demo.load()
    assert isinstance(ours.model, clip.CLIP)
    ids = ours.tokenizer(["a photo of a cat.", "a dog"])
    assert torch.equal(ids, theirs.tokenizer(["a photo of a cat.", "a dog"]))
    images = torch.randn(3, 3, 64, 64)
    with torch.no_grad():
        # Of the attention pooling only the query that is read: the same products in other shapes.
        torch.testing.assert_close(ours.model.encode_image(images), theirs.model.encode_image(images))
        assert torch.equal(ours.model.encode_text(ids), theirs.model.encode_text(ids))


def test_the_demo_does_without_what_is_slow_to_import():
    code = (
        "import sys, torch\nfrom tpt_fast.cli import app\n"
        "app(['tune', sys.argv[1], '--views', '4'], standalone_mode=False)\n"
        "assert not {'open_clip', 'torchvision', 'timm', 'torch._dynamo', 'tpt_fast.bench'} & set(sys.modules)"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    result = subprocess.run([sys.executable, "-c", code, str(CAT)], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


@pytest.mark.skipif(not hasattr(os, "wait4"), reason="processes cannot be timed here")
def test_a_second_start_is_soon_done():
    """One image in a new process, in seconds of one core, which a busy machine changes little."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tpt_fast", "tune", str(CAT), "--json"]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0
    assert used.ru_utime + used.ru_stime < 10


def test_doctor():
    result = run("doctor", "--json")
    (report,) = rows(result)
    assert report["works"] is True
    found = report["found"]
    assert found["torch"]["version"] == torch.__version__
    assert found["kernels"]["backend"] == "native"
    assert found["kernels"]["check"] == "agrees with the reference"
    assert found["products"]["float32"].startswith(("tpt_fast's (", "torch's ("))
    assert found["compiler"]["path"]
    built = [build for build in found["cache"]["builds"] if build["key"] in found["kernels"]["library"]]
    assert built
    assert built[0]["seconds"] > 0
    assert built[0]["bytes"] > 10_000
    many = found["cache"] | {"builds": [found["cache"]["builds"][0] | {"key": f"build-{i}"} for i in range(9)]}
    shown = _describe(many)
    assert "build-8" in shown
    assert "build-4" not in shown
    assert "and 5 older ones" in shown
    text = run("doctor").stdout
    for heading in ("torch", "compiler", "cuda toolkit", "GPUs", "kernels", "cache"):
        assert heading in text
    assert "the compiled kernels work" in text
    assert found["cache"]["folder"] in text


def test_doctor_where_native_is_turned_off(monkeypatch):
    monkeypatch.setattr(load, "_decided", {})
    monkeypatch.setenv("TPT_FAST_BACKEND", "reference")
    (report,) = rows(run("doctor", "--json", code=3))
    assert report["found"]["kernels"]["backend"] == "reference"
    assert any("unset it" in advice for advice in report["advice"])


def test_doctor_without_a_compiler(monkeypatch, tmp_path):
    (tmp_path / "csrc").mkdir()
    (tmp_path / "python").mkdir()
    monkeypatch.setattr(build, "source_root", lambda: tmp_path)
    monkeypatch.setattr(load, "_decided", {})
    monkeypatch.setattr(toolkit, "cxx", no_compiler)
    result = run("doctor", code=3)
    assert "the compiled kernels do not run" in result.stdout
    assert result.stdout.count("no C++ compiler: looked for") == 2  # why, and once among the advice


def test_doctor_without_torch(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    (report,) = rows(run("doctor", "--json", code=3))
    assert report["found"]["torch"] is None
    assert any("torch cannot be imported" in advice for advice in report["advice"])


def test_doctor_builds_again(monkeypatch, tmp_path):
    for folder in ("csrc", "python"):
        (tmp_path / folder).mkdir()
    (tmp_path / "csrc" / "tiny.cpp").write_text("int tpt_fast_tiny() { return 2; }\n")
    monkeypatch.setattr(build, "source_root", lambda: tmp_path)
    monkeypatch.setattr(load, "_decided", {})
    monkeypatch.setenv("TPT_FAST_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("TPT_FAST_CUDA", "0")
    for arguments in ([], ["--build"]):
        (report,) = rows(run("doctor", "--json", *arguments))
        (built,) = report["found"]["cache"]["builds"]
    assert built["time"] > (tmp_path / "csrc" / "tiny.cpp").stat().st_mtime


@pytest.mark.slow
def test_bench():
    records = rows(run("bench-demo", "--json", "--repeats", 3))
    assert len(records) == 3
    for record in records:
        assert record["ratio"] == pytest.approx(record["peer_ms"] / record["ms"])
    shown = Console(width=200, file=StringIO())
    shown.print(bench_table(records))
    assert "times faster" in shown.file.getvalue()
