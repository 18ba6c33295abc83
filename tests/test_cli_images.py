"""What the command line takes: folders of photographs, and lists of class names."""

import json
import os

import pytest
from command_line import CAT, FEW, one_demo_model, plain_terminal, rows, run, said  # noqa: F401 (fixtures)
from PIL import Image

from tpt_fast import tuner
from tpt_fast.cli._class_names import class_names
from tpt_fast.cli._images import find_images
from tpt_fast.views import crops

TWO = ["--classes", "cat,dog", *FEW]


def picture(*files):
    for file in files:
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 50), "red").save(file, format="PNG")


def found(*folders) -> list[str]:
    return [os.fspath(file) for file in find_images([os.fspath(folder) for folder in folders]).files]


# --- folders


def test_a_folder_gives_its_images_in_order(tmp_path, capsys):
    picture(*(tmp_path / name for name in ("b.png", "a.JPG", "inside/c.webp", "inside/d.jfif", "inside/e.pgm")))
    (tmp_path / "notes.txt").write_text("no image")
    (tmp_path / "._a.JPG").write_text("what macOS leaves beside one")
    (tmp_path / "folder.jpg").mkdir()
    (tmp_path / "device.jpg").symlink_to("/dev/null")
    (tmp_path / "dangling.jpg").symlink_to("absent")
    inside = ["inside/c.webp", "inside/d.jfif", "inside/e.pgm"]
    assert found(tmp_path) == [str(tmp_path / name) for name in ("a.JPG", "b.png", "dangling.jpg", *inside)]
    passed_over = capsys.readouterr().err
    for what in (".txt (1)", "hidden files (1)", "devices, pipes, sockets (1)"):
        assert what in passed_over


def test_links_to_folders_are_followed_and_not_back_up(tmp_path, capsys):
    picture(tmp_path / "store" / "a.png")
    val = tmp_path / "val"
    val.mkdir()
    (val / "cats").symlink_to("../store")
    (val / "kittens").symlink_to("../store")
    (tmp_path / "store" / "up").symlink_to(val)
    (val / "self").symlink_to(".")
    assert found(val) == [str(val / "cats" / "a.png"), str(val / "kittens" / "a.png")]
    assert "links back to a folder above (3)" in capsys.readouterr().err


def test_hidden_folders_are_passed_over(tmp_path, capsys):
    picture(tmp_path / "cats" / "a.png", tmp_path / "cats" / ".ipynb_checkpoints" / "a-checkpoint.png")
    picture(tmp_path / "__MACOSX" / "cats" / "a.png")
    assert found(tmp_path) == [str(tmp_path / "cats" / "a.png")]
    assert "hidden folders (2)" in capsys.readouterr().err


def test_folders_that_cannot_be_read_are_named(tmp_path, ordinary_user):
    picture(tmp_path / "a.png", tmp_path / "closed" / "b.png")
    (tmp_path / "closed").chmod(0)
    try:
        result = run("tune", tmp_path, "--json", *FEW, code=1)
    finally:
        (tmp_path / "closed").chmod(0o700)
    assert [row["file"] for row in rows(result)] == [str(tmp_path / "a.png")]
    assert f"{tmp_path / 'closed'} cannot be read: Permission denied" in said(result)


def test_a_folder_without_images_is_bad_usage(tmp_path):
    assert "holds no images" in said(run("tune", tmp_path, code=2))
    (tmp_path / "notes.txt").touch()
    assert ".txt (1)" in said(run("tune", tmp_path, code=2))


def test_a_url_of_a_file(tmp_path):
    (row,) = rows(run("tune", CAT.as_uri(), "--json", *FEW))
    assert row["file"] == str(CAT)
    assert "IMAGE: image: expected a path or the file: URL" in said(run("tune", "https://a.org/b.jpg", code=2)).replace(
        "'", ""
    )


# --- one image never ends a run


def test_a_sliver_has_its_row(tmp_path, monkeypatch):
    monkeypatch.setattr(crops, "_INT32_MAX", 32 * 99)  # of a million pixels decoding would take seconds
    for name, size in (("wide.png", (100, 1)), ("z.png", (40, 50))):
        Image.new("L", size).save(tmp_path / name)
    first, second = rows(run("tune", tmp_path, "--json", *FEW, code=1))
    assert "image: 1 x 100 (height x width) is too long and narrow" in first["error"]
    assert second["label"]


@pytest.mark.parametrize("error", [OverflowError("too large"), MemoryError(), RuntimeError("not enough memory")])
def test_any_error_of_an_image_is_its_row(tmp_path, monkeypatch, error):
    picture(tmp_path / "a.png", tmp_path / "b.png")
    draw_boxes, calls = tuner.draw_boxes, []

    def first_fails(*arguments, **options):
        calls.append(arguments)
        if len(calls) == 1:
            raise error
        return draw_boxes(*arguments, **options)

    monkeypatch.setattr(tuner, "draw_boxes", first_fails)
    failed = [row for row in rows(run("tune", tmp_path, "--json", *FEW, code=1)) if "error" in row]
    assert len(failed) == 1
    assert f"image: {failed[0]['file']} cannot be classified: {type(error).__name__}" in failed[0]["error"]


# --- errors of an option name it


def test_more_views_than_memory():
    message = said(run("tune", CAT, "--views", 10_000_000_000, code=2))
    assert "--views: 10000000000 views of four images at once take 1.97e+06 GB" in message


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--views", 1], "--views: n_views: expected 2 or more"),
        (["--rho", 2], "--rho: rho: expected"),
        (["--n-ctx", 0], "--n-ctx: n_ctx: expected"),
        (["--method", "tbt"], "--method: method: expected one of tpt"),
        (["--activations", "drop"], "--activations: activations: expected one of keep, recompute"),
        (["--ctx", CAT], "--ctx: "),
        (["--ctx", "torn.pt"], "--ctx: "),
        (["--resume"], "--resume: it goes with --out"),
    ],
)
def test_an_error_of_an_option_names_it(tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "torn.pt").write_bytes(b"\x80\x02.")
    assert message in said(run("tune", CAT, *arguments, code=2))


def test_any_error_of_a_checkpoint_names_ctx(monkeypatch):
    def load_start(*_, **__):
        raise IndexError("pop from empty list")

    monkeypatch.setattr("tpt_fast.prompting.cocoop.load_start", load_start)
    assert "--ctx: IndexError: pop from empty list" in said(run("tune", CAT, "--ctx", CAT, code=2))


# --- class names


def names_of(file, text: str) -> list[str] | None:
    file.write_text(text, encoding="utf-8")
    return class_names(None, file)


def test_class_names_from_a_file(tmp_path):
    file = tmp_path / "names.txt"
    text = "\ufeffcat\n  guinea pig \r\ndog\n\n \n"
    assert names_of(file, text) == ["cat", "guinea pig", "dog"]
    (row,) = rows(run("tune", CAT, "--classes-file", file, "--json", "--top", 9, *FEW))
    assert {p["label"] for p in row["top"]} == {"cat", "guinea pig", "dog"}
    assert names_of(file, "line\u2028separator\x0cname\ndog") == ["line\u2028separator\x0cname", "dog"]


def test_a_blank_line_would_shift_the_labels_behind_it(tmp_path):
    file = tmp_path / "names.txt"
    file.write_text("cat\ndog\n\nhorse\n")
    assert f"--classes-file: line 3 of '{file}' is blank: every label behind it" in said(
        run("tune", CAT, "--classes-file", file, code=2)
    )
    assert "--classes: name 2 of 'cat,,dog' is blank" in said(run("tune", CAT, "--classes", "cat,,dog", code=2))
    assert class_names("cat, dog,", None) == ["cat", "dog"]


@pytest.mark.parametrize(
    "content",
    [
        ["cat", " red fox"],
        {"0": "cat", "1": "red fox"},
        {"1": "red fox", "0": "cat"},
        {"red fox": 1, "cat": 0},
        {"0": ["n01", "cat"], "1": ["n02", "red fox"]},
    ],
)
@pytest.mark.parametrize("name", ["names.json", "names.txt"])
def test_class_names_as_json(tmp_path, content, name):
    assert names_of(tmp_path / name, json.dumps(content, indent=1)) == ["cat", "red fox"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('["cat",', "begins as JSON and is none"),
        ("{'0': 'cat'}", "begins as JSON and is none"),
        ('{"0": "cat", "2": "dog"}', "expected a JSON list of names, {"),
        ('{"cat": 0, "dog": 0}', "expected a JSON list of names, {"),
        ('{"classes": ["cat", "dog"]}', "expected a JSON list of names, {"),
        ('["cat", 7]', "expected a JSON list of names, {"),
        ('["cat", " ", "dog"]', "class 2 of"),
        ("[]", "there are no class names"),
        ("{}", "there are no class names"),
    ],
)
def test_json_of_something_else_is_refused(tmp_path, text, message):
    file = tmp_path / "names.json"
    file.write_text(text)
    assert message in said(run("tune", CAT, "--classes-file", file, code=2))


def test_one_class_is_warned_of(tmp_path, capsys):
    class_names("cat dog", None)
    assert "'cat dog' is one class, so every image is that with 100 %: write --classes 'cat,dog' for 2" in (
        capsys.readouterr().err
    )
    names_of(tmp_path / "names.txt", "cat, dog\n")
    assert "'cat, dog' is one class" in capsys.readouterr().err
    class_names("cat,dog", None)
    assert capsys.readouterr().err == ""


def test_names_that_stand_twice_are_warned_of(capsys):
    assert class_names("cat,dog,cat,dog,owl", None) == ["cat", "dog", "cat", "dog", "owl"]
    assert "warning: 'cat' and 1 more stands there several times, as several classes" in capsys.readouterr().err
