"""What is in the wheel, that a source distribution makes the same one, and that CI runs what the README says."""

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


def test_the_wheel_has_what_runs_and_nothing_else(wheel, checkout):
    expected = {str(file.relative_to(checkout)) for file in (checkout / "tpt_fast").rglob("*") if file.is_file()}
    for folder, endings in {"csrc": (".h", ".cuh", ".cpp", ".cu"), "python": (".h", ".cpp")}.items():
        sources = [file for file in (checkout / folder).iterdir() if file.suffix in endings]
        assert len(sources) > 5
        expected |= {f"tpt_fast/_sources/{folder}/{file.name}" for file in sources}
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
