"""What the cache of builds holds, and what of it may be loaded: whole builds, of people who are trusted."""

import json
import os
import re
import stat
import subprocess
import sys
import types
import warnings
from pathlib import Path

import pytest
import torch
from builds import forget

from tpt_fast import doctor
from tpt_fast.extension import build, load
from tpt_fast.extension import cache as cache_of_builds

pytestmark = pytest.mark.usefixtures("fresh")

DAMAGE = {
    "cut": lambda content: content[:1000],
    "zeroed": lambda content: content[: len(content) // 2] + bytes(len(content) - len(content) // 2),
    "one bit": lambda content: content[:-1] + bytes([content[-1] ^ 1]),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_library_is_never_loaded_but_built_again(tree, cache, damage):
    """Cut, it ended the process in SIGBUS, half zeroed in SIGSEGV: so it must not be tried."""
    final = cache / build.plan().key()
    cache_of_builds.store(final, lambda scratch: build.build(build.plan(), scratch))
    library = final / build.LIBRARIES["cpu"]
    whole = library.read_bytes()
    library.write_bytes(DAMAGE[damage](whole))
    assert load.ensure().path == library
    assert len(library.read_bytes()) == len(whole)
    assert cache_of_builds.read_record(final)


def test_a_build_is_on_the_disk_before_its_name(tree, cache, monkeypatch):
    done, sync, rename = [], os.fsync, Path.rename
    monkeypatch.setattr(os, "fsync", lambda fd: done.append(Path(os.readlink(f"/proc/self/fd/{fd}")).name) or sync(fd))
    monkeypatch.setattr(Path, "rename", lambda *paths: done.append("rename") or rename(*paths))
    load.ensure()
    before = done[: done.index("rename")]
    assert {build.LIBRARIES["cpu"], "build.json"} < set(before)
    assert ".tmp-" in before[-1]
    assert done[-1] == cache.name


def test_one_that_cannot_be_loaded_is_not_compiled_in_every_process(tree, cache, monkeypatch):
    (tree / "csrc" / "tiny.cpp").write_text("void nowhere_defined(); void tpt_fast_tiny() { nowhere_defined(); }\n")
    monkeypatch.setattr(load, "_warn", lambda message: warnings.warn(message, load.BackendWarning, stacklevel=1))
    with pytest.warns(load.BackendWarning, match="cannot be loaded: .*undefined symbol.*doctor --build"):
        first = load.ensure()
    assert first.name == "reference"
    (note,) = cache.glob("*/not_loaded.txt")
    assert "undefined symbol" in note.read_text()
    (found,) = doctor._cache(doctor.Report())["builds"]
    assert re.search("the last time it was not loaded: .*undefined symbol", found["problem"])

    forget(monkeypatch)
    compiled = []
    monkeypatch.setattr(build, "build", lambda *arguments: compiled.append(arguments))
    with pytest.warns(load.BackendWarning, match="undefined symbol"):
        assert load.ensure() == first
    assert compiled == []

    monkeypatch.undo()


def test_the_note_goes_once_the_library_loads(tree, cache, monkeypatch):
    real = torch.ops.load_library
    monkeypatch.setattr(torch.ops, "load_library", refusing_to_load)
    with pytest.warns(load.BackendWarning, match="this folder is mounted noexec"):
        load.ensure()
    (note,) = cache.glob("*/not_loaded.txt")
    forget(monkeypatch)
    monkeypatch.setattr(torch.ops, "load_library", real)
    assert load.ensure().name == "native"
    assert not note.exists()


def refusing_to_load(path):
    raise OSError(f"Could not load this library: {path}") from OSError("this folder is mounted noexec")


def give_away(monkeypatch, *paths: Path) -> None:
    """Make ``paths`` another ordinary user's, in fact or in appearance."""
    if os.geteuid() == 0:
        for path in paths:
            os.chown(path, 12345, 12345)
    else:
        monkeypatch.setattr(cache_of_builds.os, "geteuid", lambda: 12345)


@pytest.mark.parametrize("which", ["library", "record", "folder", "cache"])
def test_what_belongs_to_another_user_is_not_loaded(tree, cache, monkeypatch, which):
    library = load.ensure().path
    folder = library.parent
    give_away(
        monkeypatch, {"library": library, "record": folder / "build.json", "folder": folder, "cache": cache}[which]
    )
    forget(monkeypatch)
    monkeypatch.setattr(torch.ops, "load_library", lambda path: pytest.fail("loaded"))
    torch.ops.loaded_libraries.discard(str(library.resolve()))
    with pytest.warns(load.BackendWarning, match="belongs to .*, not to you or root.*TPT_FAST_SHARED_CACHE=1"):
        assert load.ensure().name == "reference"
    (found,) = doctor._cache(doctor.Report())["builds"]
    assert "not to you or root" in found["problem"]


@pytest.mark.parametrize(
    ("which", "mode", "says"),
    [
        ("cache", 0o777, "can be written by everyone"),
        ("folder", 0o777, "can be written by everyone"),
        ("library", 0o666, "can be written by everyone"),
        ("parent", 0o777, "can be written by everyone"),
        ("cache", 0o775, "can be written by the group"),
        ("cache", 0o755, None),
        ("cache", 0o1777, None),  # sticky: nobody can replace what belongs to another
        ("parent", 0o1777, None),
    ],
)
def test_where_somebody_else_can_write_nothing_is_loaded(tree, tmp_path, monkeypatch, which, mode, says):
    monkeypatch.setattr(cache_of_builds, "_is_private", lambda group: False)
    cache = tmp_path / "parent" / "cache"
    monkeypatch.setenv("TPT_FAST_CACHE", str(cache))
    library = load.ensure().path
    {"cache": cache, "folder": library.parent, "library": library, "parent": cache.parent}[which].chmod(mode)
    forget(monkeypatch)
    if says is None:
        assert load.ensure().path == library
    else:
        with pytest.warns(load.BackendWarning, match=says):
            assert load.ensure().name == "reference"


def test_a_group_of_ones_own_is_nobody_else(monkeypatch):
    me = types.SimpleNamespace(pw_name="ada")
    monkeypatch.setattr(cache_of_builds.pwd, "getpwuid", lambda _: me)
    for name, members, answer in (
        ("ada", [], True),
        ("ada", ["ada"], True),
        ("ada", ["eve"], False),
        ("lab", [], False),
    ):
        group = types.SimpleNamespace(gr_name=name, gr_mem=members)
        monkeypatch.setattr(cache_of_builds.grp, "getgrgid", lambda _, group=group: group)
        assert cache_of_builds._is_private(7) is answer


def modes(cache: Path) -> dict[str, int]:
    return {file.name: stat.S_IMODE(file.stat().st_mode) for file in (*cache.glob("*.lock"), *cache.glob("*/*"))}


@pytest.mark.parametrize("umask", [0o022, 0o002, 0o000, 0o077])
def test_what_one_builds_others_can_read_where_the_umask_lets_them(tree, cache, umask):
    """mkdtemp's 0700 survived the rename, so nobody could use what an administrator had built."""
    before = os.umask(umask)
    try:
        library = load.ensure().path
    finally:
        os.umask(before)
    assert stat.S_IMODE(library.parent.stat().st_mode) == 0o755 & ~umask
    assert modes(cache)[library.name] == 0o755 & ~umask
    assert all(mode & 0o022 == 0 for mode in modes(cache).values())


def test_a_shared_cache_serves_the_group_whoever_built(tree, cache, monkeypatch):
    monkeypatch.setenv("TPT_FAST_SHARED_CACHE", "1")
    cache.mkdir(mode=0o2775)
    cache.chmod(0o2775)
    before = os.umask(0o077)
    try:
        library = load.ensure().path
    finally:
        os.umask(before)
    assert stat.S_IMODE(library.parent.stat().st_mode) & 0o777 == 0o775
    assert modes(cache)[library.name] == 0o775
    assert modes(cache)["build.json"] == modes(cache)[f"{library.parent.name}.lock"] == 0o664
    give_away(monkeypatch, library, library.parent / "build.json", library.parent, cache)
    forget(monkeypatch)
    assert load.ensure().path == library

    cache.chmod(0o1777)  # not even sticky: anybody's folder may stand there before its build does
    forget(monkeypatch)
    with pytest.warns(load.BackendWarning, match="can be written by everyone"):
        assert load.ensure().name == "reference"


def test_a_misspelt_share_is_named(tree, cache, monkeypatch):
    monkeypatch.setenv("TPT_FAST_SHARED_CACHE", "lab")
    with pytest.warns(load.BackendWarning, match="TPT_FAST_SHARED_CACHE: expected 0 or 1, got 'lab'"):
        load.ensure()


HOMELESS = """
import os, pwd, sys
for name in ("HOME", "XDG_CACHE_HOME", "TPT_FAST_CACHE"):
    os.environ.pop(name, None)
def nobody(uid): raise KeyError(uid)
pwd.getpwuid = nobody
"""


def test_a_user_without_a_home_folder(tree, tmp_path):
    """As in a container that runs under a number: builds are kept with the temporary files, and everything works."""
    code = f"""{HOMELESS}
from pathlib import Path
from tpt_fast.extension import build, load
from tpt_fast.doctor import _cache, Report
build.source_root = lambda: Path({str(tree)!r})
print(load.ensure().path)
print(_cache(Report())["folder"])
os.environ["TPT_FAST_CACHE"] = "~/kernels"
report = Report()
print(_cache(report), report.advice)
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "TMPDIR": str(tmp_path)}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    library, folder, misled = result.stdout.splitlines()
    assert Path(folder) == tmp_path / f"tpt_fast-{os.getuid()}"
    assert Path(library).is_relative_to(folder)
    assert misled.startswith("None [\"TPT_FAST_CACHE: '~/kernels' has no meaning here")


def test_doctor_without_torch_and_without_a_home_folder(tmp_path):
    code = f"{HOMELESS}sys.modules['torch'] = None\nfrom tpt_fast.cli import main\nmain()"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "TMPDIR": str(tmp_path)}
    command = [sys.executable, "-c", code, "doctor", "--json"]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 3, result.stderr
    report = json.loads(result.stdout)
    assert report["found"]["torch"] is None
    assert report["found"]["cache"] == {"folder": str(tmp_path / f"tpt_fast-{os.getuid()}"), "builds": []}
    assert "Traceback" not in result.stderr
