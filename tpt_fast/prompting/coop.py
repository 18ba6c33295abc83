"""Contexts that CoOp has learned."""

from __future__ import annotations

import os
import pickle

import torch
from torch import Tensor


def load_ctx(source: str | os.PathLike | Tensor, width: int) -> Tensor:
    """A context from a CoOp checkpoint (its ``state_dict.ctx``) or from a tensor: float32 (or float64), on the CPU.

    Args:
        source: a path, loaded with ``weights_only=True``, or [n_ctx, width] or class-specific [C, n_ctx, width].
        width: the text tower's width.

    Raises:
        ValueError: an unreadable file, one without ``ctx`` or with anything but tensors and plain values in it; another
            shape or width; values that are not finite.
        TypeError: neither a path nor a tensor.
    """
    if isinstance(source, Tensor):
        ctx, name = source.detach(), "ctx"
    elif isinstance(source, (str, os.PathLike)):
        ctx, name = _checkpoint_ctx(source), f"ctx in {os.fspath(source)!r}"
    else:
        raise TypeError(f"ctx: expected a tensor or the path of a CoOp checkpoint, got {type(source).__name__}")
    if not ctx.is_floating_point() or ctx.ndim not in (2, 3) or 0 in ctx.shape:
        expected = f"floating point [n_ctx, {width}] or [C, n_ctx, {width}]"
        raise ValueError(f"{name}: expected {expected}, got {ctx.dtype} {list(ctx.shape)}")
    if ctx.shape[-1] != width:
        raise ValueError(f"{name}: expected width {width} (the model's text tower), got {list(ctx.shape)}")
    if not ctx.isfinite().all():
        raise ValueError(f"{name}: expected finite values, got NaN or infinity")
    return ctx.cpu().to(torch.float64 if ctx.dtype == torch.float64 else torch.float32)


def _checkpoint_ctx(path: str | os.PathLike) -> Tensor:
    where = f"ctx: the checkpoint {os.fspath(path)!r}"
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{where} holds something other than tensors, or is no checkpoint; it was not loaded"
        ) from error
    except (OSError, RuntimeError, EOFError, ValueError, KeyError) as error:
        raise ValueError(f"{where} cannot be read: {error}") from error
    state = content.get("state_dict", content) if isinstance(content, dict) else content
    ctx = state.get("ctx", state.get("prompt_learner.ctx")) if isinstance(state, dict) else state
    if not isinstance(ctx, Tensor):
        found = f"the keys {sorted(map(str, state))[:8]}" if isinstance(state, dict) else type(state).__name__
        raise ValueError(f"{where} has no tensor state_dict['ctx'], but {found}")
    return ctx
