"""Finding and building the extension: what is built when, and what is said when it cannot be.

Failures are tried on a source tree of one tiny file; one test builds (or finds) the real one.
"""

import json
import os
import re
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
import torch

from tpt_fast.extension import build, load, toolkit
from tpt_fast.ops import build_info

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def _fresh(monkeypatch):
    """No choice made yet, nothing found yet, none of the user's settings."""
    for name in ("TPT_FAST_BACKEND", "TPT_FAST_CUDA", "CXX", "CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(load, "_backend", None)
    found = toolkit.cxx, toolkit.cuda
    for search in found:
        search.cache_clear()
    yield
    for search in found:
        search.cache_clear()


@pytest.fixture
def cache(tmp_path, monkeypatch):
    folder = tmp_path / "cache"
    monkeypatch.setenv("TPT_FAST_CACHE", str(folder))
    return folder


@pytest.fixture
def tree(tmp_path, monkeypatch):
    """A source tree of one file, in a folder whose name wants quoting."""
    root = tmp_path / "a tree: $5"
    for folder in ("csrc", "python"):
        (root / folder).mkdir(parents=True)
    (root / "csrc" / "tiny.cpp").write_text("int tpt_fast_tiny() { return 1; }\n")
    monkeypatch.setattr(build, "source_root", lambda: root)
    monkeypatch.setenv("TPT_FAST_CUDA", "0")
    return root


def script(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


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
    first = load.ensure(lambda *step: steps.append(step))
    assert first.name == "native"
    assert first.path.is_relative_to(cache)
    assert steps[0] == (0, 2)
    assert steps[-1] == (2, 2)
    record = json.loads(first.path.with_name("build.json").read_text())
    assert record["key"] == first.path.parent.name
    assert record["seconds"] >= 0
    assert leftovers(cache) == []

    monkeypatch.setattr(load, "_backend", None)
    monkeypatch.setattr(build, "build", lambda *_: pytest.fail("built again"))
    assert load.ensure() == first


def test_rebuild(tree, cache):
    first = load.ensure()
    before = first.path.stat().st_ino, first.path.with_name("build.json").stat().st_ino
    steps = []
    assert load.ensure(lambda *step: steps.append(step), rebuild=True) == first
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


def test_a_damaged_library_is_built_again(tree, cache):
    plan = build.plan()
    final = cache / plan.key()
    load._store(plan, final, lambda *_: None, set())
    library = final / build.LIBRARY
    library.write_bytes(library.read_bytes()[:100])
    assert load.ensure().path == library
    assert library.stat().st_size > 100


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
    monkeypatch.setattr(load, "_backend", None)
    assert load.ensure() == first


# --- other processes

BUILD = """
import sys
from pathlib import Path
from tpt_fast.extension import build, load
build.source_root = lambda: Path(sys.argv[1])
print("ready", flush=True)
sys.stdin.readline()
print(load.ensure(lambda *_: None).path, flush=True)
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


def test_a_build_killed_half_way_is_cleared_away(tree, cache, tmp_path, monkeypatch):
    slow, started = tmp_path / "slow", tmp_path / "started"
    slow.touch()
    # ninja gives the compiler a process group of its own, which its own death does not reach
    waits = f"echo $$ >{started}.new; mv {started}.new {started}; exec sleep 600"
    text = f'case "$*" in *-c*tiny*) if [ -e {slow} ]; then {waits}; fi;; esac\nexec g++ "$@"'
    compiler = script(tmp_path / "bin" / "c++", text)
    process = start_build(tree, {"CXX": str(compiler)})
    process.stdin.write("\n")
    process.stdin.flush()
    deadline = time.monotonic() + 300
    while not started.exists():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    os.kill(int(started.read_text()), signal.SIGKILL)
    assert leftovers(cache) != []

    slow.unlink()
    monkeypatch.setenv("CXX", str(compiler))
    assert load.ensure().name == "native"
    assert leftovers(cache) == []


# --- CUDA toolkits


def cuda_toolkit(root: Path, release: str = "13.0", runtime: str = "libcudart.so.13") -> Path:
    for file in (root / "include" / "cuda_runtime_api.h", root / "lib" / runtime):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    says = f"release {release}, V{release}.1"
    return script(
        root / "bin" / "nvcc", f'case "$*" in *--dryrun*) echo "#$ TOP={root}/bin/.." >&2;; *) echo "{says}";; esac'
    )


def test_a_wrapper_script_leads_to_the_toolkit(tmp_path, monkeypatch):
    real = cuda_toolkit(tmp_path / "opt" / "cuda")
    wrapper = script(tmp_path / "bin" / "nvcc", f'exec {real} "$@"')
    monkeypatch.setenv("PATH", f"{wrapper.parent}:/usr/bin:/bin")
    found = toolkit.cuda()
    assert (found.nvcc, found.version, found.runtime) == (str(wrapper), (13, 0), "libcudart.so.13")
    assert found.root == str(tmp_path / "opt" / "cuda")
    assert found.include == f"{found.root}/include"
    assert found.library == f"{found.root}/lib"


def test_a_broken_toolkit_is_passed_over(tmp_path, monkeypatch):
    script(tmp_path / "broken" / "bin" / "nvcc", "exit 1")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "broken"))
    monkeypatch.setenv("PATH", f"{cuda_toolkit(tmp_path / 'good').parent}:/usr/bin:/bin")
    assert toolkit.cuda().root == str(tmp_path / "good")


def test_a_toolkit_from_pip_is_found(tmp_path, monkeypatch):
    class Spec:
        submodule_search_locations = (str(tmp_path / "nvidia"),)

    cuda_toolkit(tmp_path / "nvidia" / "cu13")
    monkeypatch.setattr(toolkit, "find_spec", lambda _: Spec)
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    monkeypatch.setattr(toolkit.shutil, "which", lambda _: None)
    assert str(tmp_path / "nvidia" / "cu13" / "bin" / "nvcc") in toolkit._candidates()


@pytest.mark.parametrize(
    ("torch_cuda", "found", "message"),
    [
        (None, None, "this torch is a CPU build"),
        ("13.2", None, r"no CUDA toolkit: looked for nvcc in CUDA_HOME.*Install CUDA 13.2"),
        ("13.2", "12.4", r"torch is built for CUDA 13.2, but .* is CUDA 12.4: the major versions must agree"),
    ],
)
def test_what_is_said_without_a_fitting_toolkit(tree, tmp_path, monkeypatch, torch_cuda, found, message):
    release = found and tuple(map(int, found.split(".")))
    cuda = found and toolkit.Cuda("/x/nvcc", release, "/x", "/x/include", "/x/lib", "libcudart.so")
    monkeypatch.setattr(torch.version, "cuda", torch_cuda)
    monkeypatch.setattr(toolkit, "cuda", lambda: cuda)
    monkeypatch.setenv("TPT_FAST_CUDA", "1")
    with pytest.raises(load.BuildError, match=message):
        build.plan()


def test_a_misspelt_cuda_choice_is_named(tree, monkeypatch):
    monkeypatch.setenv("TPT_FAST_CUDA", "yes")
    with pytest.raises(load.BuildError, match="TPT_FAST_CUDA: expected 0 or 1, got 'yes'"):
        build.plan()


@pytest.mark.parametrize(
    ("architecture", "flag"),
    [
        ("8.0", "-gencode=arch=compute_80,code=[sm_80]"),
        ("9.0+PTX", "-gencode=arch=compute_90,code=[sm_90,compute_90]"),
        ("9.0a", "-gencode=arch=compute_90a,code=[sm_90a]"),
        ("12.0", "-gencode=arch=compute_120,code=[sm_120]"),
    ],
)
def test_architecture_flags(architecture, flag):
    assert build._gencode(architecture) == flag


@pytest.mark.parametrize(
    ("listed", "names"),
    [("8.0;9.0+PTX", ["8.0", "9.0+PTX"]), ("9.0a 12.0", ["9.0a", "12.0"]), ("Hopper", None), ("sm_90", None)],
)
def test_listed_architectures(listed, names, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", listed)
    if names:
        assert toolkit.architectures() == names
    else:
        with pytest.raises(load.BuildError, match=f"TORCH_CUDA_ARCH_LIST: expected numbers .* got '{listed}'"):
            toolkit.architectures()


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
