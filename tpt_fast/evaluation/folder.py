"""What stands beside the rows of a set: which set and model they are of, and which options they were made with."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import __version__
from .._files import atomic_write, locked
from ..config import TuneConfig
from ..methods import SHARED, Method, method_options
from ..views.make import pass_order

if TYPE_CHECKING:
    from .sets import ImageSet

ABOUT = "set.json"


def set_folder(out: str | Path, name: str) -> Path:
    """The folder of a set's results, made if it is missing; a name that is no folder's has its letters replaced."""
    plain = re.sub(r"[^\w.-]+", "_", name).strip("._") or "set"
    if plain != name:  # two names must not meet in one folder
        plain += f"-{hashlib.sha256(name.encode()).hexdigest()[:6]}"
    folder = Path(out) / plain
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def set_folders(out: str | Path) -> list[Path]:
    """Those below ``out``, by name.

    Raises:
        ValueError: there are none.
    """
    found = sorted(each.parent for each in Path(out).glob(f"*/{ABOUT}"))
    if not found:
        raise ValueError(f"out: expected the folder of an evaluation, with NAME/{ABOUT} in it, got {out}")
    return found


def read_about(folder: Path) -> dict[str, Any]:
    return json.loads((folder / ABOUT).read_text("utf-8"))


def note_down(
    folder: Path, images: ImageSet, config: TuneConfig, methods: Mapping[str, Method], model: Mapping[str, Any]
) -> None:
    """Write ``set.json``, or add methods to the one that is there.

    Raises:
        ValueError: what is there was made otherwise, naming the first difference.
    """
    about = {
        "name": images.name,
        "digest": images.digest,
        "images": len(images),
        "classnames": list(images.classnames),
        "notes": list(images.notes),
        "model": dict(model),
        "options": _options(config) | {"resampling": pass_order()},
        "methods": {label: _described(method) for label, method in methods.items()},
    }
    about = json.loads(json.dumps(about))
    with locked(folder / ABOUT):
        if (folder / ABOUT).exists():
            before = read_about(folder)
            _check_same(folder, before, about)
            about["methods"] = before["methods"] | about["methods"]
        about["tpt_fast"], about["torch"] = __version__, torch.__version__
        with atomic_write(folder / ABOUT) as aside:
            aside.write_text(f"{json.dumps(about, indent=1)}\n", "utf-8")


def _options(config: TuneConfig) -> dict[str, Any]:
    """All but what runs of one folder may differ in, and what the methods say."""
    other = ("seed", "method", *SHARED)
    return {name: _plain(value) for name, value in vars(config).items() if name not in other}


def _described(method: Method) -> dict[str, Any]:
    options = {name: _plain(getattr(method, name)) for name in method_options(method)}
    if isinstance(method, Method) and not options and dataclasses.is_dataclass(method):
        options = {"as": repr(method)}
    return {"method": method.name, **options}


def _plain(value: Any) -> Any:
    """As JSON holds it; of tensors and files what says which they are."""
    if isinstance(value, Tensor):
        return hashlib.sha256(value.detach().cpu().contiguous().numpy().tobytes()).hexdigest()
    if isinstance(value, (str, os.PathLike)) and os.path.isfile(value):
        return hashlib.sha256(Path(value).read_bytes()).hexdigest()
    if value is None or isinstance(value, (str, int, float, bool)):
        return value
    return [_plain(each) for each in value] if isinstance(value, (list, tuple)) else repr(value)


def _check_same(folder: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    for name in ("name", "digest", "images", "classnames"):
        if before[name] != now[name]:
            was, got = (each[name] if name != "classnames" else f"{len(each[name])} names" for each in (before, now))
            raise ValueError(f"out: {folder} has rows of another set: its {name} was {was}, now it is {got}")
    was, got = ({"weights": each["model"]["weights"], **each["options"]} for each in (before, now))
    for name in was | got:
        if was.get(name) != got.get(name):
            raise ValueError(
                f"{name}: expected {was.get(name)!r}, which {folder} was made with, got {got.get(name)!r}; "
                "or another out"
            )
    for label in before["methods"].keys() & now["methods"].keys():
        was, got = before["methods"][label], now["methods"][label]
        for name in was | got:
            if was.get(name) != got.get(name):
                raise ValueError(
                    f"{name}: expected {was.get(name)!r}, which method {label!r} in {folder} was run with, "
                    f"got {got.get(name)!r}; or another out, or another name for the method"
                )
