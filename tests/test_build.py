"""Finding and building the extension: what is built when, and what is said when it cannot be.

Failures are tried on a source tree of one tiny file; one test builds (or finds) the real one.
"""

import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from builds import forget, script

from tpt_fast import doctor
from tpt_fast.extension import build, load, toolkit
from tpt_fast.ops import build_info

pytestmark = pytest.mark.usefixtures("fresh")
ROOT = Path(__file__).resolve().parent.parent


def leftovers(cache: Path) -> list[str]:
    return [file.name for file in cache.iterdir() if ".tmp-" in file.name]


# --- the ordinary way


def test_the_real_sources_build_and_load():
    backend = load.ensure()
    assert backend.name == "native", backend.why
    assert build_info().startswith("CPU")


def test_importing_builds_nothing_and_leaves_torch_alone(tmp_path):
    code = "import sys, tpt_fast; assert 'torch' not in sys.modules; import tpt_fast.tuner; tpt_fast.tune"
    environment = {**os.environ, "TPT_FAST_CACHE": str(tmp_path / "cache"), "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)
    assert not (tmp_path / "cache").exists()


def test_built_once_then_found(tree, cache, monkeypatch):
    steps = []
    first = load.ensure(progress=lambda *step: steps.append(step))
    assert first.name == "native"
    assert first.path.is_relative_to(cache)
    assert steps[0] == (0, 2)
    assert steps[-1] == (2, 2)
    record = json.loads(first.path.with_name("build.json").read_text())
    assert record["key"] == first.path.parent.name
    assert record["seconds"] >= 0
    assert leftovers(cache) == []

    forget(monkeypatch)
    monkeypatch.setattr(build, "build", lambda *_: pytest.fail("built again"))
    assert load.ensure() == first


def test_rebuild(tree, cache):
    first = load.ensure()
    before = first.path.stat().st_ino, first.path.with_name("build.json").stat().st_ino
    steps = []
    assert load.ensure(progress=lambda *step: steps.append(step), rebuild=True) == first
    assert steps
    assert (first.path.stat().st_ino, first.path.with_name("build.json").stat().st_ino) != before


def test_a_first_build_says_so_on_stderr(tree, cache, capsys):
    load.ensure()
    said = capsys.readouterr()
    assert said.out == ""
    assert "compiling the kernels" in said.err


def test_key_changes_with_a_source_and_not_with_its_place(tree, tmp_path, monkeypatch):
    here = build.plan().key()
    elsewhere = tmp_path / "elsewhere"
    tree.rename(elsewhere)
    monkeypatch.setattr(build, "source_root", lambda: elsewhere)
    assert build.plan().key() == here
    (elsewhere / "csrc" / "extra.h").write_text("// more\n")
    assert build.plan().key() != here


# --- choosing


def test_reference_builds_nothing(tree, cache, monkeypatch):
    monkeypatch.setenv("TPT_FAST_BACKEND", "reference")
    assert load.ensure() == load.Backend("reference", why="TPT_FAST_BACKEND=reference")
    assert not cache.exists()


def test_a_misspelt_backend_is_named(monkeypatch):
    monkeypatch.setenv("TPT_FAST_BACKEND", "fast")
    with pytest.raises(ValueError, match="TPT_FAST_BACKEND: expected auto, native or reference, got 'fast'"):
        load.ensure()


@pytest.fixture
def no_compiler(tmp_path, monkeypatch):
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))


def test_no_compiler_warns_once_and_falls_back(tree, cache, no_compiler):
    with pytest.warns(load.BackendWarning, match=r"no C\+\+ compiler: looked for c\+\+, g\+\+, clang\+\+.*apt-get"):
        backend = load.ensure()
    assert backend.name == "reference"
    assert "no C++ compiler" in backend.why
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load.ensure() is backend


def test_no_compiler_is_an_error_where_native_is_wanted(tree, cache, no_compiler, monkeypatch):
    monkeypatch.setenv("TPT_FAST_BACKEND", "native")
    with pytest.raises(load.BuildError, match=r"TPT_FAST_BACKEND=native, but .* no C\+\+ compiler"):
        load.ensure()


def test_cxx_names_the_compiler(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(load.BuildError, match="looked for no-such-compiler on the PATH"):
        toolkit.cxx()


def test_cxx_is_split_as_a_shell_does(tree, cache, tmp_path, monkeypatch):
    """A launcher and flags, quoted where they have blanks: in every command line, and the compiler alone for nvcc."""
    log = tmp_path / "launched"
    launcher = script(tmp_path / "with blanks" / "ccache", f'echo "$1" >>{log}\nexec "$@"')
    monkeypatch.setenv("CXX", f"'{launcher}' g++ -m64 '-DNAME=two words'")
    found = toolkit.cxx()
    assert found.command == (str(launcher), "g++", "-m64", "-DNAME=two words")
    assert (found.program, found.flags) == ("g++", ("-m64", "-DNAME=two words"))
    assert "g++" in found.version or "GCC" in found.version
    (tree / "csrc" / "tiny.cpp").write_text("#define TEXT(x) #x\nstatic_assert(sizeof TEXT(NAME) == 5);\n")
    assert load.ensure().name == "native"
    assert len(log.read_text().splitlines()) >= 3  # the version, the source, the link


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("g++ 'half", r"CXX: expected words as in a shell, got \"g\+\+ 'half\""),
        ("env no-such-compiler -m64", "looked for no-such-compiler on the PATH"),
    ],
)
def test_a_cxx_that_is_none(monkeypatch, words, message):
    monkeypatch.setenv("CXX", words)
    with pytest.raises(load.BuildError, match=message):
        toolkit.cxx()


def test_missing_ninja_is_called_missing_ninja(tree, cache, tmp_path, monkeypatch):
    for name in ("c++", "as", "ld"):
        script(tmp_path / "bin" / name, f'exec {shutil.which(name)} "$@"')
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setitem(sys.modules, "ninja", None)
    with pytest.warns(load.BackendWarning, match="ninja is missing, which runs the compilers: pip install ninja"):
        assert load.ensure().name == "reference"
    assert doctor.examine().found["ninja"] is None


@pytest.mark.skipif(platform.machine() != "x86_64", reason="-march is x86-64's here")
def test_march_is_what_the_variable_says(tree, cache, monkeypatch):
    """Another key, another record of what the code needs, and no code for a CPU that cannot run it is loaded."""
    native = build.plan()
    assert native.march == ("-march=native",)
    monkeypatch.setenv("TPT_FAST_MARCH", "x86-64-v3")
    plan = build.plan()
    assert plan.key() != native.key()
    assert "-march=x86-64-v3" in plan.cxx_flags
    assert "-march=native" not in plan.cxx_flags
    needs = build._needs(plan)
    assert {"avx2", "fma", "bmi2"} < set(needs)
    assert not any(name.startswith("avx512") for name in needs)

    flags = {"avx", "avx2", "fma", "sse3"}
    monkeypatch.setattr(build, "cpu_flags", lambda: flags)
    monkeypatch.setattr(torch.ops, "load_library", lambda path: pytest.fail("loaded"))
    with pytest.warns(load.BackendWarning, match="needs a CPU with bmi, bmi2, .*, which this one does not have"):
        assert load.ensure().name == "reference"


def test_this_cpu_has_what_its_own_code_needs(tree, cache):
    """For any CPU and compiler: their names for the same things are told apart from things that are missing."""
    record = json.loads(load.ensure().path.with_name("build.json").read_text())
    assert build.missing_sets(record) == []
    if platform.machine() == "x86_64":
        assert record["needs"]
        compiler = toolkit.cxx()
        assert toolkit.instruction_sets(compiler, ["-march=x86-64"]) == set()
        assert "avx512f" in toolkit.instruction_sets(compiler, ["-march=x86-64-v4"])


def test_a_misspelt_march_is_named(tree, cache, monkeypatch):
    monkeypatch.setenv("TPT_FAST_MARCH", "native; rm -r /")
    with pytest.warns(load.BackendWarning, match="TPT_FAST_MARCH: expected what -march takes"):
        assert load.ensure().name == "reference"


def test_a_broken_source_shows_what_the_compiler_said(tree, cache, monkeypatch):
    (tree / "csrc" / "tiny.cpp").write_text("int tpt_fast_tiny( { return 1; }\n")
    with pytest.warns(load.BackendWarning, match=r"the compilation failed") as caught:
        backend = load.ensure()
    assert "tiny.cpp:1" in str(caught[0].message)
    assert "error:" in str(caught[0].message)
    assert backend.name == "reference"
    assert leftovers(cache) == []


@pytest.mark.parametrize("folder", ["file/cache", "locked/cache", "locked"])
def test_a_cache_that_cannot_be_written(tree, tmp_path, monkeypatch, ordinary_user, folder):
    (tmp_path / "file").write_text("")
    (tmp_path / "locked").mkdir(mode=0o555)
    monkeypatch.setenv("TPT_FAST_CACHE", str(tmp_path / folder))
    with pytest.warns(load.BackendWarning, match="cannot be written .* Set TPT_FAST_CACHE to a folder that can"):
        assert load.ensure().name == "reference"


def test_a_read_only_cache_with_the_build_in_it_serves(tree, cache, monkeypatch, ordinary_user):
    first = load.ensure()
    for folder in (cache, first.path.parent):
        folder.chmod(0o555)
    with pytest.raises(PermissionError):
        (cache / "anything").touch()
    forget(monkeypatch)
    assert load.ensure() == first


# --- other processes

BUILD = """
import sys
from pathlib import Path
from tpt_fast.extension import build, load
build.source_root = lambda: Path(sys.argv[1])
print("ready", flush=True)
sys.stdin.readline()
print(load.ensure(progress=lambda *_: None).path, flush=True)
"""


def start_build(tree: Path, environment: dict[str, str]) -> subprocess.Popen:
    """A process that waits for a line before it builds; the import of torch is behind it then."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "TPT_FAST_BACKEND": "native", **environment}
    return subprocess.Popen(
        [sys.executable, "-c", BUILD, str(tree)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
        start_new_session=True,
    )


def test_two_processes_at_once_build_once(tree, cache, tmp_path):
    log = tmp_path / "compiled"
    compiler = script(
        tmp_path / "bin" / "c++", f'case "$*" in *-c*tiny*) echo x >> {log}; sleep 1;; esac\nexec g++ "$@"'
    )
    both = [start_build(tree, {"CXX": str(compiler)}) for _ in range(2)]
    for process in both:
        assert process.stdout.readline() == "ready\n"
    for process in both:
        process.stdin.write("\n")
        process.stdin.flush()
    paths = [process.communicate(timeout=300)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert paths[0] == paths[1]
    assert Path(paths[0].strip()).exists()
    assert log.read_text() == "x\n"
    assert leftovers(cache) == []


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_build_that_is_ended_leaves_no_compiler_running(tree, cache, tmp_path, monkeypatch, how):
    """By Ctrl-C in a notebook (which reaches the one process), by a job scheduler, by lack of memory."""
    slow, started = tmp_path / "slow", tmp_path / "started"
    slow.touch()
    waits = f"echo $$ >{started}.new; mv {started}.new {started}; exec sleep 600"
    text = f'case "$*" in *-c*tiny*) if [ -e {slow} ]; then {waits}; fi;; esac\nexec g++ "$@"'
    compiler = script(tmp_path / "bin" / "c++", text)
    process = start_build(tree, {"CXX": str(compiler)})
    process.stdin.write("\n")
    process.stdin.flush()
    wait_until(started.exists, while_runs=process)
    running = int(started.read_text())
    os.kill(process.pid, how)
    process.communicate()
    wait_until(lambda: not is_running(running))
    assert (leftovers(cache) == []) == (how == signal.SIGINT)  # the others give no time to clear away

    slow.unlink()
    monkeypatch.setenv("CXX", str(compiler))
    assert load.ensure().name == "native"
    assert leftovers(cache) == []


def wait_until(is_true: Callable[[], bool], while_runs: subprocess.Popen | None = None) -> None:
    deadline = time.monotonic() + 100
    while not is_true():
        assert while_runs is None or while_runs.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_a_misspelt_number_of_jobs_is_named(tree, cache, monkeypatch):
    monkeypatch.setenv("MAX_JOBS", "all")
    with pytest.warns(load.BackendWarning, match="MAX_JOBS: expected a number, got 'all'"):
        assert load.ensure().name == "reference"


# --- what keeps a binding at three seconds, and the numerics free of torch


def includes(folder: str) -> list[tuple[str, str]]:
    files = [file for file in (build.source_root() / folder).iterdir() if file.suffix in {".h", ".cuh", ".cpp", ".cu"}]
    assert files
    pattern = re.compile(r'^\s*#\s*include\s*[<"]([^>"]+)', re.MULTILINE)
    return [(file.name, header) for file in files for header in pattern.findall(file.read_text())]


def test_csrc_knows_nothing_of_torch_and_python():
    foreign = re.compile(r"^(torch|ATen|c10|caffe2|pybind11|nanobind)/|^Python\.h$")
    assert [pair for pair in includes("csrc") if foreign.match(pair[1])] == []


def test_python_includes_the_stable_abi_only():
    # The C shim is what the stable ABI itself stands on; it alone gives the current CUDA stream.
    allowed = re.compile(r"^torch/(csrc/stable|headeronly)/|^torch/csrc/inductor/aoti_torch/c/shim[a-z_]*\.h$")
    foreign = re.compile(r"^(torch|ATen|c10|caffe2|pybind11|nanobind)/|^Python\.h$")
    assert [pair for pair in includes("python") if foreign.match(pair[1]) and not allowed.match(pair[1])] == []
