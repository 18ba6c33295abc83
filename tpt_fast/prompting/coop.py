"""Contexts that CoOp (Zhou et al., IJCV 2022) has learned."""

from __future__ import annotations

import os

import torch
from torch import Tensor

from .checkpoint import check_stored, read, state_of

#: What CoOp's prompt learner holds: the context, and embeddings of its training classes, which are not read.
_COOP = {"ctx", "token_prefix", "token_suffix"}
#: What only others' checkpoints hold -> whose they are.
_OTHERS = {
    "meta_net.": "CoCoOp's, whose context depends on the image",
    "compound_prompt": "MaPLe's, which learns prompts of both towers",
    "VPT": "PromptSRC's or another with visual prompts",
    "ctx_att": "ATPrompt's, which learns attributes too",
    "ZS_": "PromptSRC's",
}


def load_ctx(source: str | os.PathLike | Tensor, width: int | None = None) -> Tensor:
    """A context from a CoOp checkpoint (its ``state_dict.ctx``), from a safetensors file (its ``ctx``), whichever model
    its header names, or from a tensor: float32 (or float64), on the CPU.

    Args:
        source: a path, as CoOp's trainer leaves it: nothing that is in it is run, see
            :mod:`tpt_fast.prompting.checkpoint`; or [n_ctx, width] or class-specific [C, n_ctx, width].
        width: the text tower's width, which it must have; None: any.

    Raises:
        ValueError: an unreadable file; one without ``ctx``, or of another method; another shape or width; values that
            are not finite.
        TypeError: neither a path nor a tensor.
    """
    if isinstance(source, Tensor):
        ctx, name = source.detach(), "ctx"
    elif isinstance(source, (str, os.PathLike)):
        ctx, name = _checkpoint_ctx(source), f"ctx in {os.fspath(source)!r}"
    else:
        raise TypeError(f"ctx: expected a tensor or the path of a CoOp checkpoint, got {type(source).__name__}")
    wide = "width" if width is None else width
    expected = f"floating point [n_ctx, {wide}] or [C, n_ctx, {wide}]"
    if ctx.layout is not torch.strided or ctx.is_meta:
        raise ValueError(f"{name}: expected {expected} with values, got {ctx.layout} on {ctx.device}")
    if not ctx.is_floating_point() or ctx.ndim not in (2, 3) or 0 in ctx.shape:
        raise ValueError(f"{name}: expected {expected}, got {ctx.dtype} {list(ctx.shape)}")
    if width not in (None, ctx.shape[-1]):
        raise ValueError(f"{name}: expected width {width} (the model's text tower), got {list(ctx.shape)}")
    if not isinstance(source, Tensor):
        check_stored(name, ctx)
    ctx = ctx.cpu().to(torch.float64 if ctx.dtype == torch.float64 else torch.float32)
    if not ctx.isfinite().all():
        raise ValueError(f"{name}: expected finite values, got NaN or infinity")
    return ctx


def _checkpoint_ctx(path: str | os.PathLike) -> Tensor:
    where = f"ctx: the checkpoint {os.fspath(path)!r}"
    try:
        content = read(path)
    except ValueError as error:
        raise ValueError(f"ctx: {error}") from error
    if isinstance(content, Tensor):
        return content.detach()
    state = state_of(content)
    if state is None:
        raise ValueError(f"{where} has no tensor state_dict['ctx'], but {type(content).__name__}")
    for name in state:
        for mark, whose in _OTHERS.items():
            if mark in name:
                raise ValueError(f"{where} holds {name!r}: it is {whose}; expected CoOp's")
    if "ctx" not in state:
        found = sorted(map(str, state)) or sorted(map(str, content))
        raise ValueError(f"{where} has no tensor state_dict['ctx'], but the keys {found[:8]}")
    if unknown := sorted(state.keys() - _COOP):
        raise ValueError(
            f"{where} holds more than CoOp's context, {unknown[:4]}: it is another method's; expected CoOp's"
        )
    return state["ctx"].detach()
