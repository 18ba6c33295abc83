"""What this machine has, whether the compiled kernels work on it, and what to do about what is missing."""

from __future__ import annotations

import os
import platform
import shlex
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from .extension import build, cache, toolkit


@dataclass
class Report:
    """``found``: a value (or None for what is missing) under each heading; JSON can hold all of it."""

    works: bool = False  #: the compiled kernels load and run, and the objective's agree with the reference
    found: dict[str, Any] = field(default_factory=dict)
    advice: list[str] = field(default_factory=list)  #: a sentence for each thing that is missing


def examine(progress: Callable[[int, int], None] | None = None, *, rebuild: bool = False) -> Report:
    """Look around, then load the kernels (building them if need be) and hold them to the reference.

    Args:
        progress, rebuild: see :func:`tpt_fast.extension.load.ensure`.
    """
    report = Report()
    found = report.found
    found["tpt_fast"] = {"version": _version("tpt_fast"), "folder": str(Path(__file__).parent)}
    found["python"] = {"version": platform.python_version(), "program": sys.executable}
    found["machine"] = {"system": platform.platform(), "cores": os.cpu_count()}
    _packages(report)
    _compilers(report)
    if _torch(report):
        _kernels(report, progress, rebuild)
        found["products"] = _products()
        found["text tower"] = _text_tower()
    found["cache"] = _cache(report)
    return report


def towers(model: Any, tokenizer: Any = None) -> dict[str, str]:
    """How each tower of ``model`` runs, and why not the fast way where it does not."""
    from .clip import Clip

    clip = Clip(model, tokenizer=tokenizer)
    text, image = clip.text.why_module, clip.image.why_module
    return {
        "text": "packed" if text is None else f"module: {text}",
        "image": clip.image.engine if image is None else f"module: {image}",
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _packages(report: Report) -> None:
    pillow, open_clip = _version("pillow"), _version("open_clip_torch")
    order = "pillow-13" if pillow and int(pillow.partition(".")[0]) >= 13 else "pillow-12"
    report.found["pillow"] = pillow and {"version": pillow, "pass order": order}
    report.found["open_clip"] = open_clip
    report.found["matplotlib"] = _version("matplotlib")
    for name, installed in (("pillow", pillow), ("open_clip_torch", open_clip)):
        if installed is None:
            report.advice.append(f"{name} is missing: pip install {name}")
    if report.found["matplotlib"] is None:
        report.advice.append("matplotlib is missing, which only plots need: pip install 'tpt_fast[plot]'")


def _compilers(report: Report) -> None:
    try:
        compiler = toolkit.cxx()
        report.found["compiler"] = {"path": shlex.join(compiler.command), "version": compiler.version}
    except toolkit.BuildError as error:
        report.found["compiler"] = None
        report.advice.append(str(error))
    try:
        report.found["ninja"] = toolkit.ninja()
    except toolkit.BuildError as error:
        report.found["ninja"] = None
        report.advice.append(str(error))
    cuda = toolkit.cuda()
    release = cuda and ".".join(map(str, cuda.version))
    report.found["cuda toolkit"] = cuda and {"nvcc": cuda.nvcc, "root": cuda.root, "version": release}


def _torch(report: Report) -> bool:
    try:
        import torch
    except (ImportError, OSError) as error:  # OSError: one of its libraries does not load
        report.found["torch"] = None
        report.advice.append(f"torch cannot be imported ({error}): pip install 'torch>=2.10'")
        return False
    report.found["torch"] = {
        "version": torch.__version__,
        "CUDA": torch.version.cuda,
        "threads": torch.get_num_threads(),
    }
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    gpus = [torch.cuda.get_device_name(i) for i in range(count)]
    report.found["GPUs"] = gpus
    try:
        report.found["architectures"] = toolkit.architectures() if torch.version.cuda else []
    except toolkit.BuildError as error:
        report.found["architectures"] = []
        report.advice.append(str(error))
    if gpus and report.found["cuda toolkit"] is None:
        report.advice.append(
            f"there is a GPU but no CUDA toolkit to compile its kernels: install CUDA {torch.version.cuda}, or "
            "pip install nvidia-cuda-nvcc nvidia-cuda-runtime nvidia-cuda-cccl; or set CUDA_HOME"
        )
    return True


def _kernels(report: Report, progress: Callable[[int, int], None] | None, rebuild: bool) -> None:
    gpus = range(len(report.found["GPUs"]))
    halves = {"kernels": ("cpu", ["cpu"])}
    if gpus or os.environ.get("TPT_FAST_CUDA") == "1":
        halves["CUDA kernels"] = ("cuda", [f"cuda:{i}" for i in gpus])
    works = [_half(report, title, *half, progress, rebuild) for title, half in halves.items()]
    report.works = all(works)


def _half(
    report: Report,
    title: str,
    half: str,
    devices: list[str],
    progress: Callable[[int, int], None] | None,
    rebuild: bool,
) -> bool:
    """Whether one half of the kernels, which ``title`` names, loads and is right on ``devices``."""
    import warnings

    from .extension import load

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", load.BackendWarning)
        try:
            backend = load.ensure(half, progress=progress, rebuild=rebuild)
        except (load.BuildError, ValueError) as error:
            backend = load.Backend("none", why=str(error))
    kernels = {"backend": backend.name, "library": backend.path and str(backend.path), "why": backend.why or None}
    report.found[title] = kernels
    if backend.name == "native":
        report.advice += [str(warning.message) for warning in caught]  # that the installed ones were not taken
        if half == "cpu":
            from .ops import build_info

            kernels["built as"] = build_info()
        right = all(map(_agrees, devices))
        if devices:
            kernels["check"] = "agrees with the reference" if right else "DISAGREES with the reference"
        if not right:
            report.advice.append("the compiled kernels are wrong here: `tpt-fast doctor --build`, and please report it")
        return right
    if backend.why in {"TPT_FAST_BACKEND=reference", "TPT_FAST_CUDA=0"}:
        report.advice.append(f"{backend.why} turns the compiled kernels off: unset it")
    elif backend.why not in report.advice:
        report.advice.append(backend.why)
    return False


def _agrees(device: str) -> bool:
    """One small call of the compiled objective against its definition on the CPU."""
    import torch

    from .ops import objective
    from .reference.objective import objective as reference

    logits = torch.linspace(-3, 3, 35).sin().mul(4).reshape(5, 7)
    found = (value.cpu() for value in objective(logits.to(device), 2))
    return all(torch.allclose(a, b, atol=1e-5) for a, b in zip(found, reference(logits, 2), strict=True))


def _products() -> dict[str, str] | None:
    """Whose product runs the layers of a tower of each type on this CPU, as measured."""
    from .extension import load
    from .models import products

    if load.ensure().name != "native":
        return None
    return {str(dtype).removeprefix("torch."): products.described(dtype) for dtype in products.DTYPES}


def _text_tower() -> dict[str, Any]:
    """How ViT-B/16's would be divided in the memory that is free now."""
    import torch

    from .text.memory import plan

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    chosen = plan(device, width=512, depth=12, expansion=4, itemsize=4)
    kept = chosen.kept_bytes // chosen.row_bytes
    return {
        "device": device.type,
        "free memory": f"{chosen.free / 1e9:.1f} GB",
        "tokens at once": chosen.rows_at_once,
        "activations kept": f"{chosen.kept_bytes / 1e9:.1f} GB, {kept} tokens of ViT-B/16's tower in float32",
    }


def _cache(report: Report) -> dict[str, Any] | None:
    try:
        folder = cache.folder()
    except toolkit.BuildError as error:
        report.advice.append(str(error))
        return None
    names = {name: half for half, name in build.LIBRARIES.items()}
    builds = []
    for library in (file for name in names for file in folder.glob(f"*/{name}")):
        kept = library.parent
        try:
            size, built, words = library.stat().st_size, library.stat().st_mtime, None
            if (kept / cache.NOT_LOADED).exists():
                words = (kept / cache.NOT_LOADED).read_text().strip()
            record, why = cache.read_record(kept), None
            cache.check_owners(kept)
        except toolkit.BuildError as error:
            why = str(error)
        except OSError:  # going away
            continue
        problem = why or ("damaged" if record is None else words and f"the last time it was not loaded: {words}")
        summary = {"key": kept.name, "half": names[library.name], "bytes": size, "time": built}
        builds.append({**summary, "seconds": record and record.get("seconds"), "problem": problem})
    return {"folder": str(folder), "builds": sorted(builds, key=lambda build: build["time"])}
