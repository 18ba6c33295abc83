"""CUDA's half of the extension: toolkits, architectures, and that neither half waits for the other or fails with it."""

import threading
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from builds import script

from tpt_fast.extension import build, load, toolkit

pytestmark = pytest.mark.usefixtures("fresh")


def cuda_toolkit(root: Path, release: str = "13.0", runtime: str = "libcudart.so.13", compiles: str = "exit 9") -> Path:
    """A toolkit that can be found; ``compiles`` is what its nvcc does with a source."""
    for file in (root / "include" / "cuda_runtime_api.h", root / "lib" / runtime):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    says = f"release {release}, V{release}.1"
    return script(
        root / "bin" / "nvcc",
        f'case "$*" in *--dryrun*) echo "#$ TOP={root}/bin/.." >&2;; *" -c "*) {compiles};; *) echo "{says}";; esac',
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
        build.plan("cuda")


def test_a_misspelt_cuda_choice_is_named(tree, monkeypatch):
    monkeypatch.setenv("TPT_FAST_CUDA", "yes")
    with pytest.raises(ValueError, match="TPT_FAST_CUDA: expected 0 or 1, got 'yes'"):
        load.ensure()


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
    [
        ("8.0;9.0+PTX", ["8.0", "9.0+PTX"]),
        ("9.0a 12.0", ["9.0a", "12.0"]),
        ("Hopper", "expected numbers"),
        ("sm_90", "expected numbers"),
        ("7.0", "expected 7.5 or later"),
    ],
)
def test_listed_architectures(listed, names, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", listed)
    if isinstance(names, list):
        assert toolkit.architectures() == names
    else:
        with pytest.raises(load.BuildError, match=f"TORCH_CUDA_ARCH_LIST: {names}.* got '{listed}'"):
            toolkit.architectures()


def test_turing_is_built_for_where_there_is_no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    assert toolkit.architectures()[0] == "7.5"


def gpus(monkeypatch, *capabilities: tuple[int, int]) -> None:
    """Let torch see GPUs of these compute capabilities."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(capabilities))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda i: capabilities[i])
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda i: "GPU {}.{}".format(*capabilities[i]))


@pytest.mark.parametrize(
    ("known", "there", "chosen"),
    [
        ("75 80 90", [(9, 0)], ["9.0"]),
        ("75 80 90", [(8, 0), (7, 5), (8, 0)], ["7.5", "8.0"]),
        ("75 80 90", [(12, 0)], ["9.0+PTX"]),  # an nvcc older than the GPU
        ("75 80 86 90", [(8, 9), (8, 6)], ["8.6", "8.6+PTX"]),
        ("", [(12, 0)], ["12.0"]),  # it does not say
        (
            "75 80 90",
            [(9, 0), (6, 1)],
            r"GPU 6\.1 \(sm_61\) is too old for the CUDA kernels.*7\.5.*CUDA_VISIBLE_DEVICES",
        ),
        ("100 120", [(7, 5)], r"nvcc no longer compiles for GPU 7\.5 \(sm_75\)"),
    ],
)
def test_the_gpus_that_are_there_decide(tmp_path, monkeypatch, known, there, chosen):
    nvcc = script(tmp_path / "nvcc", "\n".join(f"echo compute_{number}" for number in known.split()))
    monkeypatch.setattr(toolkit, "cuda", lambda: toolkit.Cuda(str(nvcc), (13, 0), "/x", "/x", "/x", "x"))
    gpus(monkeypatch, *there)
    if isinstance(chosen, list):
        assert toolkit.architectures() == chosen
    else:
        with pytest.raises(load.BuildError, match=chosen):
            toolkit.architectures()


# --- two halves

COMPILES = """while [ "$1" != -c ]; do shift; done; exec g++ -fPIC -x c++ -c "$2" -o "$4\""""


@pytest.fixture
def nvcc(tree, cache, tmp_path, monkeypatch):
    """Called with what nvcc does, makes one, and a source for it; what it makes is linked with nothing of CUDA."""

    def install(compiles: str) -> None:
        made = cuda_toolkit(tmp_path / "cuda", compiles=compiles)
        monkeypatch.setenv("CUDA_HOME", str(made.parent.parent))

    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setenv("TPT_FAST_CUDA", "1")
    (tree / "csrc" / "tiny.cu").write_text("int tpt_fast_tiny_on_cuda() { return 2; }\n")
    (tree / "python" / "tiny.cpp").write_text("int tpt_fast_tiny_binding() { return 3; }\n")
    (tree / "python" / "other.cpp").write_text("#ifdef TPT_FAST_CUDA\n#error this op has no CUDA source\n#endif\n")
    real = build.plan
    monkeypatch.setattr(
        build, "plan", lambda half: replace(real(half), link_flags=("-shared",)) if half == "cuda" else real(half)
    )
    return install


def test_the_cpus_half_is_used_while_cudas_compiles(nvcc, tmp_path):
    go, steps = tmp_path / "go", []
    nvcc(f"while [ ! -e {go} ]; do sleep 0.05; done; {COMPILES}")
    first = load.ensure()
    assert first.name == "native"
    assert first.path.name == "tpt_fast.so"
    assert load.ensure("cpu") is first
    assert load._background[0].is_alive()
    threading.Timer(0.3, go.touch).start()
    second = load.ensure(torch.device("cuda", 0), progress=lambda *step: steps.append(step))
    assert go.exists()
    assert second.name == "native"
    assert second.path.name == "tpt_fast_cuda.so"
    assert steps[-1] == (3, 3)
    assert load._background == []
    assert load.ensure("cuda:1") is second


PTXAS = "echo 'ptxas fatal: bfloat16 needs sm_80' >&2; exit 255"


def test_cudas_half_fails_alone_and_says_why(nvcc):
    nvcc(PTXAS)
    first = load.ensure()
    with pytest.warns(load.BackendWarning, match=r"(?s)compiled CUDA kernels are not available.*ptxas fatal") as caught:
        second = load.ensure("cuda")
    assert len(caught) == 1
    assert (first.name, second.name) == ("native", "reference")
    assert "ptxas fatal" in second.why
    assert load.ensure() is first
    assert load.ensure("cuda") is second


def test_cudas_half_is_an_error_where_native_is_wanted(nvcc, monkeypatch):
    nvcc(PTXAS)
    monkeypatch.setenv("TPT_FAST_BACKEND", "native")
    assert load.ensure().name == "native"
    with pytest.raises(load.BuildError, match=r"(?s)=native, but the compiled CUDA kernels .*ptxas fatal"):
        load.ensure("cuda")


def test_a_gpu_that_is_too_old_costs_only_its_own_kernels(nvcc, monkeypatch):
    nvcc(COMPILES)
    gpus(monkeypatch, (6, 1))
    monkeypatch.delenv("TPT_FAST_CUDA")
    assert load.ensure().name == "native"
    with pytest.warns(load.BackendWarning, match=r"GPU 6\.1 \(sm_61\) is too old"):
        assert load.ensure("cuda").name == "reference"


@pytest.mark.parametrize(("choice", "why"), [("0", "TPT_FAST_CUDA=0"), (None, "torch sees no GPU")])
def test_where_nobody_wants_cuda_nothing_is_compiled_or_said(nvcc, cache, monkeypatch, choice, why):
    nvcc(PTXAS)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    monkeypatch.delenv("TPT_FAST_CUDA")
    if choice:
        monkeypatch.setenv("TPT_FAST_CUDA", choice)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load.ensure("cuda") == load.Backend("reference", why=why)
        assert load.ensure().name == "native"
    assert load._background == []


@pytest.mark.parametrize("used", [False, True])
def test_a_process_that_leaves_the_gpu_alone_compiles_nothing_for_it(nvcc, monkeypatch, used):
    nvcc(COMPILES)
    gpus(monkeypatch, (9, 0))
    monkeypatch.delenv("TPT_FAST_CUDA")
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: used)
    load.ensure()
    assert bool(load._background) is used
    if used:
        assert load.ensure("cuda").name == "native"


def test_cudas_half_serves_every_cpu(nvcc, monkeypatch):
    """Its code for the CPU is a few checks and launches, so a cluster's nodes share one build of it."""
    nvcc(COMPILES)
    before = {half: build.plan(half).key() for half in build.LIBRARIES}
    monkeypatch.setattr(build, "cpu_identity", lambda: "another CPU")
    monkeypatch.setenv("TPT_FAST_MARCH", "x86-64-v3")
    assert build.plan("cuda").key() == before["cuda"]
    assert build.plan("cpu").key() != before["cpu"]
