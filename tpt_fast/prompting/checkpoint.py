"""Checkpoints of other people's trainers, read without running anything that is in them.

A trainer pickles what it has: CoOp's leaves its optimizer, its scheduler (an object of a class of its own) and numpy
scalars beside the ``state_dict``. Here tensors and plain containers are made, and whatever else a pickle names becomes
an :class:`Inert` object: it takes any arguments, and nothing is imported or called.
"""

from __future__ import annotations

import io
import os
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor


class _Callable:
    """A function or class that a pickle may call, and not change: it may set the state of whatever it names."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function

    def __call__(self, *arguments: Any) -> Any:
        return self._function(*arguments)

    def __setstate__(self, _state: Any) -> None: ...


#: What a pickle may name: only these are looked up, by these very names.
_ALLOWED: dict[tuple[str, str], Callable[..., Any]] = {
    ("collections", "OrderedDict"): OrderedDict,
    ("torch", "Size"): torch.Size,
    ("torch._utils", "_rebuild_tensor"): torch._utils._rebuild_tensor,
    ("torch._utils", "_rebuild_tensor_v2"): torch._utils._rebuild_tensor_v2,
    ("torch._utils", "_rebuild_parameter"): torch._utils._rebuild_parameter,
}
_TYPES = ("Double", "Float", "Half", "BFloat16", "Long", "Int", "Short", "Char", "Byte", "Bool")
_ALLOWED |= {("torch", f"{name}Storage"): getattr(torch, f"{name}Storage") for name in _TYPES}
_CALLABLE = {name: _Callable(what) for name, what in _ALLOWED.items()}


class Inert:
    """Stands for an object of a class that is not known, and holds what it was made of where it is a mapping."""

    def __new__(cls, *_arguments: Any, **_options: Any) -> Inert:
        return super().__new__(cls)

    def __init__(self, *_arguments: Any, **_options: Any) -> None: ...

    def __call__(self, *_arguments: Any, **_options: Any) -> Inert:
        return Inert()

    def __setstate__(self, _state: Any) -> None: ...

    def __setitem__(self, _key: Any, _value: Any) -> None: ...

    def append(self, _value: Any) -> None: ...

    def extend(self, _values: Any) -> None: ...

    def add(self, _value: Any) -> None: ...


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        return _CALLABLE.get((module, name), Inert)


def _load(file: Any, **options: Any) -> Any:
    return _Unpickler(file, **options).load()


_INERT_PICKLE = SimpleNamespace(
    __name__="pickle",
    Unpickler=_Unpickler,
    load=_load,
    loads=lambda data, **options: _load(io.BytesIO(data), **options),
)


def read(path: str | os.PathLike) -> Any:
    """What ``torch.save`` has written to ``path``, on the CPU, unknown objects as :class:`Inert`; of a
    safetensors file, its tensors.

    Raises:
        ValueError: the file cannot be read, is no checkpoint, or would unpack to more than it is long.
    """
    where = f"the checkpoint {os.fspath(path)!r}"
    try:
        size = Path(path).stat().st_size
        if is_safetensors(path):
            from safetensors.torch import load_file

            return load_file(path)
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as files:
                names = [each.filename for each in files.infolist()]
                if sum(each.file_size for each in files.infolist()) > size:
                    raise ValueError(f"{where} would unpack to more than its {size} bytes; it was not loaded")
            if any(name.endswith("constants.pkl") for name in names):
                raise ValueError(f"{where} is a TorchScript archive, which is code; it was not loaded")
            if any(name.endswith(".npy") for name in names):
                raise ValueError(f"{where} is NumPy's .npz; pass an array of it, as torch.from_numpy(array)")
            if not any(name.endswith("data.pkl") for name in names):
                raise ValueError(f"{where} is an archive, but none of torch.save's")
        with open(path, "rb") as file:
            if file.read(6) == b"\x93NUMPY":
                raise ValueError(f"{where} is NumPy's .npy; pass its array, as torch.from_numpy(numpy.load(path))")
        return torch.load(path, map_location="cpu", weights_only=False, pickle_module=_INERT_PICKLE)
    except ValueError as error:
        if str(error).startswith(where):
            raise
        raise ValueError(f"{where} cannot be read: {error}") from error
    except Exception as error:  # a damaged file ends anywhere in its pickle, with whatever error
        what = str(error).partition("\n")[0] or type(error).__name__
        raise ValueError(f"{where} cannot be read, or is none: {what}") from error


def is_safetensors(path: str | os.PathLike) -> bool:
    """Whether a file begins as a safetensors file does: how long its header is, and a header in JSON."""
    try:
        with open(path, "rb") as file:
            start = file.read(9)
            return start[8:] == b"{" and int.from_bytes(start[:8], "little") < os.fstat(file.fileno()).st_size
    except OSError:  # which whoever reads it will tell
        return False


def read_header(path: str | os.PathLike) -> dict[str, str]:
    """What :func:`tpt_fast.save_ctx` has written beside the context; empty for a file without."""
    if not is_safetensors(path):
        return {}
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            return file.metadata() or {}
    except SafetensorError as error:
        raise ValueError(f"ctx: {os.fspath(path)!r} cannot be read: {error}") from error


def state_of(content: Any) -> dict[str, Tensor] | None:
    """The tensors of a checkpoint's ``state_dict``, or of the whole content, without the prefixes that wrappers leave
    (``module.``, ``prompt_learner.``); None where there is none."""
    state = content.get("state_dict", content) if isinstance(content, dict) else None
    if not isinstance(state, dict):
        return None
    plain = {}
    for name, value in state.items():
        if isinstance(name, str) and isinstance(value, Tensor):
            while name.startswith(("module.", "prompt_learner.")):
                name = name.partition(".")[2]
            plain[name] = value
    return plain


def check_stored(name: str, tensor: Tensor) -> None:
    """Refuse a tensor that stands for more numbers than its file holds: strides of 0 make gigabytes of nothing.

    Raises:
        ValueError: naming it, and how much it would be.
    """
    needed, stored = tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes()
    if needed > stored:
        raise ValueError(f"{name}: expected as many numbers as are stored, got {list(tensor.shape)} of {stored} bytes")
