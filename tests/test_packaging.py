"""What is in the wheel, that a source distribution makes the same one, and that CI runs what the README says."""

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import tpt_fast

ROOT = Path(__file__).resolve().parent.parent


def build(kind: str, source: Path, folder: Path) -> Path:
    """Through setuptools' own hooks, in a process of its own, with what is installed here."""
    code = f"import os, sys; os.chdir(sys.argv[1]); from setuptools import build_meta as b; b.build_{kind}(sys.argv[2])"
    result = subprocess.run([sys.executable, "-c", code, source, folder], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    (made,) = folder.iterdir()
    return made


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Path:
    """The tracked files alone: nobody's build leftovers."""
    listed = subprocess.run(["git", "-C", str(ROOT), "ls-files", "-z"], capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    folder = tmp_path_factory.mktemp("checkout")
    for name in filter(None, listed.stdout.split("\0")):
        if (ROOT / name).exists():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes((ROOT / name).read_bytes())
    return folder


@pytest.fixture(scope="module")
def wheel(checkout, tmp_path_factory) -> Path:
    return build("wheel", checkout, tmp_path_factory.mktemp("wheel"))


def names(wheel: Path) -> set[str]:
    return {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}


def test_the_wheel_has_what_is_written_down_and_nothing_else(wheel, checkout):
    """tests/wheel.txt says which files; a room or a kind of file that it does not know is not packed by accident."""
    patterns = (ROOT / "tests" / "wheel.txt").read_text().split()
    root = {"tpt_fast/_sources/csrc": "csrc", "tpt_fast/_sources/python": "python"}
    expected = set()
    for pattern in patterns:
        folder, _, ending = pattern.rpartition("/")
        found = {f"{folder}/{file.name}" for file in (checkout / root.get(folder, folder)).glob(ending)}
        assert found, f"nothing is {pattern}"
        expected |= found
    assert names(wheel) == expected


def test_the_wheel_fits_every_platform_and_is_small(wheel):
    assert wheel.name.endswith("-py3-none-any.whl")
    assert wheel.stat().st_size < 8e6


def test_the_source_distribution_makes_the_same_wheel(checkout, wheel, tmp_path):
    archive = build("sdist", checkout, tmp_path / "sdist")
    with tarfile.open(archive) as opened:
        opened.extractall(tmp_path / "unpacked", filter="data")
    (source,) = (tmp_path / "unpacked").iterdir()
    assert names(build("wheel", source, tmp_path / "again")) == names(wheel)


def test_one_version(wheel):
    stated = re.search(r'^version = "(.+)"', (ROOT / "pyproject.toml").read_text(), re.M)[1]
    assert wheel.name.split("-")[1] == stated
    assert tpt_fast.__version__ in (stated, "0+unknown")  # the latter in a checkout that is not installed


def test_the_installed_wheel_runs_from_anywhere(wheel, tmp_path):
    """``python -m tpt_fast`` of the wheel, not of the checkout, knows its version and finds every source and weight."""
    zipfile.ZipFile(wheel).extractall(tmp_path)
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    command = [sys.executable, "-m", "tpt_fast", "--version"]
    said = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True).stdout
    assert said.split() == ["tpt-fast", wheel.name.split("-")[1]]
    code = (
        "from pathlib import Path; from tpt_fast.extension import build; from tpt_fast.demo import weights\n"
        "assert build.source_root() == Path('tpt_fast/_sources').resolve(), build.source_root()\n"
        "assert weights.WEIGHTS.exists() and weights.WEIGHTS.is_relative_to(Path.cwd()), weights.WEIGHTS"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


@pytest.fixture
def ahead_of_time(checkout, tmp_path, monkeypatch) -> Path:
    """The package from a wheel that was compiled ahead of time, of a source tree of one tiny file, unpacked."""
    source = shutil.copytree(checkout, tmp_path / "tree")
    for folder in ("csrc", "python"):
        shutil.rmtree(source / folder)
        (source / folder).mkdir()
        (source / folder / "tiny.h").touch()
    (source / "csrc" / "tiny.cpp").write_text("int tpt_fast_tiny() { return 1; }\n")
    monkeypatch.setenv("TPT_FAST_AOT", "1")
    monkeypatch.setenv("TPT_FAST_CUDA", "0")
    wheel = build("wheel", source, tmp_path / "wheel")
    assert "-none-any" not in wheel.name
    zipfile.ZipFile(wheel).extractall(tmp_path / "installed")
    return tmp_path / "installed" / "tpt_fast"


AHEAD_OF_TIME = """
import json, sys, warnings
from pathlib import Path
from tpt_fast.extension import load
prebuilt = Path("tpt_fast/_kernels/cpu").resolve()
record = json.loads((prebuilt / "build.json").read_text())
def show():
    load._decided.clear()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        path = str(load.ensure().path)
    print(json.dumps([path, *(str(warning.message) for warning in caught)]))
show()
(prebuilt / "build.json").write_text(json.dumps({**record, "needs": [*record["needs"], "avx1024"]}))
show()
(prebuilt / "build.json").write_text(json.dumps(record))
(prebuilt / "tpt_fast.so").rename(prebuilt / "mapped.so")
(prebuilt / "tpt_fast.so").write_bytes((prebuilt / "mapped.so").read_bytes()[:1000])
show()
"""


def test_kernels_compiled_ahead_of_time_are_checked_before_they_are_loaded(ahead_of_time, tmp_path):
    """A wheel made on another CPU, or damaged on the way here: said, and compiled here in its place."""
    environment = {**os.environ, "PYTHONPATH": str(ahead_of_time.parent), "TPT_FAST_BACKEND": "native"}
    environment["TPT_FAST_CACHE"] = str(tmp_path / "cache")
    result = subprocess.run(
        [sys.executable, "-c", AHEAD_OF_TIME], cwd=ahead_of_time.parent, env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    whole, foreign, damaged = map(json.loads, result.stdout.splitlines())
    assert whole == [str(ahead_of_time / "_kernels" / "cpu" / "tpt_fast.so")]
    for (path, message), why in ((foreign, "needs a CPU with avx1024"), (damaged, "is damaged")):
        assert Path(path).is_relative_to(tmp_path / "cache")
        assert re.search(f"installed cannot be used and are compiled here instead.*{why}", message)


# --- what the documentation has to say


def environment_variables() -> set[str]:
    """Every TPT_FAST_* in the tracked files that can read the environment; macros of the C++ sources are others."""
    listed = subprocess.run(["git", "-C", str(ROOT), "ls-files", "-z"], capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    files = (ROOT / name for name in listed.stdout.split("\0") if name)
    read = [file for file in files if file.is_file() and (file.suffix in {".py", ".yml"} or ".ci" in file.parts)]
    assert len(read) > 100
    return {name for file in read for name in re.findall(r"\bTPT_FAST_[A-Z_]*[A-Z]\b", file.read_text())}


def test_every_environment_variable_is_documented_in_one_place():
    described = (ROOT / "docs" / "environment.md").read_text()
    rows = set(re.findall(r"^\| `(TPT_FAST_[A-Z_]+)` \|", described, re.M))
    found = environment_variables()
    assert "TPT_FAST_BACKEND" in found
    assert found - rows == set(), "not in docs/environment.md"
    assert rows - found == set(), "only in docs/environment.md"


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("cmake") is None, reason="no cmake")
def test_csrc_compiles_by_itself(checkout, tmp_path):
    """CMakeLists.txt, without torch or Python among the include folders."""
    for arguments in (["-S", checkout, "-B", tmp_path], ["--build", tmp_path, "-j2"]):
        result = subprocess.run(["cmake", *arguments], capture_output=True, text=True)
        assert result.returncode == 0, result.stdout + result.stderr
    assert (tmp_path / "libtpt_fast.a").exists()
    commands = (tmp_path / "compile_commands.json").read_text()
    assert all(f"/{file.name}" in commands for file in (checkout / "csrc").glob("*.cpp"))


def test_ci_runs_the_readmes_commands():
    readme, ci = (ROOT / "README.md").read_text(), (ROOT / ".ci" / "run").read_text()
    assert re.search(r"^pip install '\.\[test\]' && pytest\b", readme, re.M)
    assert re.search(r"^pip install \. && tpt-fast demo\b", readme, re.M)
    assert "README.md" in ci
    assert 'tpt-fast" demo' in ci
