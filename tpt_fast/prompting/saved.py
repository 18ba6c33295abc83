"""Contexts in files of one's own: safetensors, whose header says which model they belong to."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from .._files import atomic_write
from .checkpoint import read_header
from .cocoop import META_NET, CoCoOp, load_start

if TYPE_CHECKING:
    from ..clip import Clip
    from ..text.tower import TextTower
    from ..tuner import Tuner


def load_ctx(source: str | os.PathLike | Tensor) -> Tensor | CoCoOp:
    """What a file holds, whichever model it belongs to, as ``ctx=`` takes it: a tensor, or CoCoOp's context and net.

    Args:
        source: a safetensors file, or a checkpoint of CoOp's or CoCoOp's, in which nothing is run.

    Raises:
        ValueError: an unreadable file; one without ``ctx``, or of another method; values that are not finite.
    """
    return load_start(source)


def save_ctx(
    ctx: Tensor | CoCoOp,
    path: str | os.PathLike,
    model: Tuner | Clip | nn.Module,
    *,
    name: str | None = None,
    ctx_init: str | None = None,
    classnames: Sequence[str] | None = None,
) -> None:
    """Write a context as safetensors: whole or not at all, over a file that is there.

    ``ctx=path`` takes it wherever a context is taken, and refuses it for another model than this one, for another place
    of the class name, and, where each class has a context of its own, for other classes.

    Args:
        ctx: floating point [n_ctx, width] or class-specific [C, n_ctx, width], such as ``result.ctx``; or a
            :class:`~tpt_fast.prompting.CoCoOp`.
        path: the file.
        model: whose context it is.
        name: the model's, for people. Default: what the model says of itself.
        ctx_init: where in the prompt the class name stands ("[CLS]"), as :class:`~tpt_fast.TuneConfig` has it. Default:
            a Tuner's; not written, and not checked, where that is not known.
        classnames: of a class-specific context. Default: a Tuner's.

    Raises:
        TypeError, ValueError: a context that is none of this model's, or another number of names than of contexts.
        OSError: the file cannot be written.
    """
    from safetensors.torch import save_file

    from ..tuner import Tuner

    if isinstance(model, Tuner):
        ctx_init = model.config.ctx_init if ctx_init is None else ctx_init
        classnames = model.classnames if classnames is None else classnames
        model = model.clip
    if not isinstance(ctx, (Tensor, CoCoOp)):
        raise TypeError(f"ctx: expected a tensor or a CoCoOp, got {type(ctx).__name__}")
    tower = text_tower(model)
    ctx = load_start(ctx, tower.width)
    header = {"made_by": "tpt_fast", "model": name or tower.name, "digest": tower.digest}
    if ctx_init is not None:
        header["name_at"] = _name_at(ctx_init)
    if isinstance(ctx, CoCoOp):
        header["feature"] = "of length 1" if ctx.normalised else "as it is"
        tensors = {name: getattr(ctx, field) for name, field in {"ctx": "ctx", **META_NET}.items()}
    else:
        tensors = {"ctx": ctx}
    if tensors["ctx"].dim() == 3 and classnames is not None:
        if len(classnames) != len(tensors["ctx"]):
            raise ValueError(f"classnames: expected {len(tensors['ctx'])}, one for each context, got {len(classnames)}")
        header["classnames"] = json.dumps([*classnames])
    with atomic_write(path) as aside:
        save_file({name: tensor.contiguous().cpu() for name, tensor in tensors.items()}, aside, header)


def check_header(
    source: Any, tower: TextTower, ctx_init: str | None = None, classnames: Sequence[str] | None = None
) -> None:
    """Refuse a file whose header says that its context was made for another prompt than this one, where that is given.

    Raises:
        ValueError: another model, place of the class name, or classes.
    """
    if not isinstance(source, (str, os.PathLike)):
        return
    header, where = read_header(source), f"ctx: {os.fspath(source)!r}"
    if "digest" in header and header["digest"] != tower.digest:
        raise ValueError(
            f"{where} is a context of {header.get('model')} (digest {header['digest'][:12]}), which says nothing to "
            f"another model, and this is {tower.name} (digest {tower.digest[:12]}). To use it nevertheless, pass its "
            "tensor, tpt_fast.load_ctx(path), or write it anew with `tpt-fast words FILE --relabel OTHER`"
        )
    if ctx_init is not None and header.get("name_at", _name_at(ctx_init)) != _name_at(ctx_init):
        raise ValueError(
            f"{where} was learned with the class name at {header['name_at']!r}, and ctx_init={ctx_init!r} has it at "
            f"{_name_at(ctx_init)!r}"
        )
    theirs = json.loads(header.get("classnames", "null"))
    if theirs is not None and classnames is not None and _spaced(theirs) != _spaced(classnames):
        raise ValueError(f"{where} has contexts of the classes {_some(theirs)}, got classnames {_some(classnames)}")


def text_tower(model: Clip | nn.Module) -> TextTower:
    """The text tower of a model, or the one of a Clip."""
    from ..clip import Clip
    from ..text.tower import TextTower

    if isinstance(model, Clip):
        return model.text
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a model, a Clip or a Tuner, got {type(model).__name__}")
    return TextTower(model, engine="module")  # which converts nothing


def _name_at(ctx_init: str) -> str:
    """ "end", "front", or between which words the class name stands."""
    template = " ".join(ctx_init.replace("_", " ").split())
    before, _, after = template.partition("[CLS]")
    if not after.strip():
        return "end"
    return template if before.strip() else "front"


def _spaced(names: Sequence[str]) -> list[str]:
    return [name.replace("_", " ") for name in names]


def _some(names: Sequence[str]) -> str:
    return f"{[*names[:5]]}{f' and {len(names) - 5} more' if len(names) > 5 else ''}"
