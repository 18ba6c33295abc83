"""What this machine has, whether the compiled kernels work on it, and what to do about what is missing."""

from __future__ import annotations

import json
import os
import platform
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from .extension import build, toolkit


@dataclass
class Report:
    """``found``: a value (or None for what is missing) under each heading; JSON can hold all of it."""

    works: bool = False  #: the compiled kernels load and run, and the objective's agree with the reference
    found: dict[str, Any] = field(default_factory=dict)
    advice: list[str] = field(default_factory=list)  #: a sentence for each thing that is missing


def examine(progress: Callable[[int, int], None] | None = None, *, rebuild: bool = False) -> Report:
    """Look around, then load the kernels (building them if need be) and hold them to the reference.

    Args:
        progress, rebuild: see :func:`tpt_fast.load.ensure`.
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
        found["text tower"] = _text_tower()
        found["cache"] = _cache()
    return report


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
        report.found["compiler"] = {"path": compiler.path, "version": compiler.version}
    except toolkit.BuildError as error:
        report.found["compiler"] = None
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
    report.found["architectures"] = toolkit.architectures() if torch.version.cuda else []
    if gpus and report.found["cuda toolkit"] is None:
        report.advice.append(
            f"there is a GPU but no CUDA toolkit to compile its kernels: install CUDA {torch.version.cuda}, or "
            "pip install nvidia-cuda-nvcc nvidia-cuda-runtime nvidia-cuda-cccl; or set CUDA_HOME"
        )
    return True


def _kernels(report: Report, progress: Callable[[int, int], None] | None, rebuild: bool) -> None:
    import warnings

    from .extension import load

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", load.BackendWarning)  # the report says it better
            backend = load.ensure(progress, rebuild=rebuild)
    except (load.BuildError, ValueError) as error:
        backend = load.Backend("none", why=str(error))
    kernels = {"backend": backend.name, "library": backend.path and str(backend.path), "why": backend.why or None}
    if backend.name == "native":
        from .ops import build_info

        kernels["built as"] = build_info()
        report.works = all(map(_agrees, ["cpu", *(f"cuda:{i}" for i in range(len(report.found["GPUs"])))]))
        kernels["check"] = "agrees with the reference" if report.works else "DISAGREES with the reference"
        if not report.works:
            report.advice.append("the compiled kernels are wrong here: `tpt-fast doctor --build`, and please report it")
    elif backend.why.startswith("TPT_FAST_BACKEND=reference"):
        report.advice.append("TPT_FAST_BACKEND=reference turns the compiled kernels off: unset it")
    elif backend.why not in report.advice:
        report.advice.append(backend.why)
    report.found["kernels"] = kernels


def _agrees(device: str) -> bool:
    """One small call of the compiled objective against its definition on the CPU."""
    import torch

    from .ops import objective
    from .reference.objective import objective as reference

    logits = torch.linspace(-3, 3, 35).sin().mul(4).reshape(5, 7)
    found = (value.cpu() for value in objective(logits.to(device), 2))
    return all(torch.allclose(a, b, atol=1e-5) for a, b in zip(found, reference(logits, 2), strict=True))


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


def _cache() -> dict[str, Any]:
    from .extension import load

    folder = load.cache_folder()
    builds = []
    for record in folder.glob(f"*/{build.LIBRARY}"):
        try:
            written = json.loads(record.with_name("build.json").read_text())
            size, built = record.stat().st_size, record.stat().st_mtime
        except (OSError, ValueError):  # going away, or not ours
            continue
        summary = {"key": record.parent.name, "bytes": size, "seconds": written.get("seconds"), "time": built}
        builds.append({**summary, "cuda": written.get("nvcc") is not None})
    return {"folder": str(folder), "builds": sorted(builds, key=lambda build: build["time"])}
