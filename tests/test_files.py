"""Atomic writes: a file is whole or as it was, whoever writes beside us, and no planted link is followed."""

import os
import secrets
import stat
from concurrent.futures import ThreadPoolExecutor

import pytest

from tpt_fast._files import atomic_write, check_writable, locked
from tpt_fast.bench import rows


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text("{}\n")

    def interrupted():
        with atomic_write(file) as aside:
            aside.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert file.read_text() == "{}\n"
    assert os.listdir(tmp_path) == [file.name]


def test_each_writer_has_a_file_of_its_own(tmp_path):
    file = tmp_path / "picture.png"
    with atomic_write(file) as one, atomic_write(file) as other:
        assert one != other
        assert one.suffix == other.suffix == ".png"
        one.write_text("one")
        other.write_text("other")
    assert file.read_text() == "one"  # which ended last
    assert os.listdir(tmp_path) == [file.name]


def test_a_planted_link_is_not_followed(tmp_path, monkeypatch):
    victim = tmp_path / "victim"
    victim.write_text("precious")
    (tmp_path / ".views.png.tmp.png").symlink_to(victim)  # what the name was once
    (tmp_path / ".tpt-fast-guessed.png").symlink_to(victim)
    with atomic_write(tmp_path / "views.png") as aside:
        aside.write_text("picture")
    assert not (tmp_path / "views.png").is_symlink()
    monkeypatch.setattr(secrets, "token_hex", lambda _bytes: "guessed")
    for write in (check_writable, lambda path: atomic_write(path).__enter__()):
        with pytest.raises(FileExistsError):
            write(tmp_path / "views.png")
    assert victim.read_text() == "precious"


def test_a_link_stays_a_link(tmp_path):
    link = tmp_path / "link.jsonl"
    link.symlink_to("rows")
    rows.write(link, [{"case": "one"}])
    assert link.is_symlink()
    assert rows.read(tmp_path / "rows") == [{"case": "one"}]


def test_what_is_no_regular_file_stays(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match="not a regular file"), atomic_write(tmp_path / "pipe"):
        pass
    assert (tmp_path / "pipe").is_fifo()


def test_permissions_are_an_ordinary_files(tmp_path):
    new, old = tmp_path / "new", tmp_path / "old"
    old.touch(0o600)
    before = os.umask(0o027)
    try:
        for file in (new, old):
            with atomic_write(file) as aside:
                aside.write_text("text")
    finally:
        os.umask(before)
    assert [stat.S_IMODE(file.stat().st_mode) for file in (new, old)] == [0o640, 0o600]


def test_content_is_on_the_disk_before_the_name_is(tmp_path, monkeypatch):
    done = []
    monkeypatch.setattr(os, "fsync", lambda _opened: done.append("sync"))
    replace = os.replace
    monkeypatch.setattr(os, "replace", lambda *paths: (done.append("replace"), replace(*paths)))
    with atomic_write(tmp_path / "file") as aside:
        aside.write_text("text")
    assert done == ["sync", "replace", "sync"]  # of the file, and of its folder


def test_a_folder_that_cannot_be_read_can_be_written(tmp_path, ordinary_user):
    folder = tmp_path / "folder"
    folder.mkdir()
    folder.chmod(0o300)
    try:
        with atomic_write(folder / "file") as aside:
            aside.write_text("text")
    finally:
        folder.chmod(0o700)
    assert (folder / "file").read_text() == "text"


def test_a_lock_that_cannot_be_made_is_an_error_at_once(tmp_path):
    (tmp_path / ".b.lock").symlink_to(tmp_path / "victim")
    for file in (tmp_path / "absent" / "a", tmp_path / "b"):
        with pytest.raises(OSError), locked(file):
            pass
    assert not (tmp_path / "victim").exists()


def test_writers_of_one_file_lose_no_rows(tmp_path):
    file = tmp_path / "rows.jsonl"
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(lambda number: rows.write(file, [{"case": str(number)}]), range(40)))
    assert sorted(int(row["case"]) for row in rows.read(file)) == list(range(40))
