"""Causal attention of many suffixes that share one prefix, rows packed without padding."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..extension import load
from ..reference import prefix_attention as reference
from ._library import check_tensors, define, differentiate_once
from ._types import FLOATING

define(
    "prefix_attention(Tensor q, Tensor kv, Tensor offsets, int prefix, int heads) -> Tensor", reference.prefix_attention
)
define(
    "prefix_attention_backward(Tensor grad, Tensor q, Tensor kv, Tensor offsets, int prefix, int heads,"
    " Tensor(a!) grad_q, Tensor(b!) grad_kv) -> ()",
    reference.prefix_attention_backward,
)

_MAX_KEYS = 1024  # of a query: prefix and suffix together
MAX_CUDA_HEAD = 128  #: width of a head that the CUDA kernels take


@torch.library.register_fake("tpt_fast::prefix_attention")
def _fake(q, kv, offsets, prefix, heads):
    return q.new_empty(q.shape)


@torch.library.register_fake("tpt_fast::prefix_attention_backward")
def _fake_backward(grad, q, kv, offsets, prefix, heads, grad_q, grad_kv):
    return None


def _setup_context(ctx: Any, inputs: Any, output: Any) -> None:
    q, kv, offsets, ctx.prefix, ctx.heads = inputs
    ctx.save_for_backward(q, kv, offsets)


def _backward(ctx, grad):
    q, kv, offsets = ctx.saved_tensors
    grad_q, grad_kv = (torch.empty_like(t, memory_format=torch.contiguous_format) for t in (q, kv))
    torch.ops.tpt_fast.prefix_attention_backward(grad, q, kv, offsets, ctx.prefix, ctx.heads, grad_q, grad_kv)
    return grad_q, grad_kv, None, None, None


differentiate_once("prefix_attention", _backward, _setup_context)


def prefix_attention(q: Tensor, kv: Tensor, offsets: Tensor, prefix: int, heads: int) -> Tensor:
    """Multi-head causal attention over packed rows: one shared prefix, then every class's suffix.

    A row of the prefix sees the prefix up to itself. A row of a suffix sees the whole prefix and its own suffix up to
    itself, which is what causal attention over ``prefix + suffix`` of each class would compute. Scores are scaled by
    1 / sqrt(head width); softmax in float32 at least. Differentiable once.

    Args:
        q: [B, R, W] queries of all rows, or [B, C, W] of each suffix's last row only (the EOT token).
        kv: [B, R, 2W] keys and values of all rows. The last dimension of ``q`` and ``kv`` has to be dense, the others
            may have any stride: halves of one [B, R, 3W] will do.
        offsets: int64 [C + 1] first row of each suffix, ascending; offsets[0] = prefix and offsets[C] = R. Others are
            an error on the CPU, undefined on CUDA.
        prefix: rows of the prefix, 0 or more.
        heads: divides W.

    Returns:
        [B, R, W], or [B, C, W], in the type of ``kv``.

    Raises:
        ValueError, TypeError: shapes or types that do not fit, or a prefix of over 1024 rows.
        RuntimeError: by the compiled kernel on the CPU, which alone looks at them: other offsets, or over 1024 keys for
            a query.
    """
    check_tensors("prefix_attention", differentiable=True, q=q, kv=kv, offsets=offsets)
    _check(q, kv, offsets, prefix, heads)
    load.ensure(kv.device)
    return torch.ops.tpt_fast.prefix_attention(q, kv, offsets, prefix, heads)


def prefix_attention_backward(
    grad: Tensor, q: Tensor, kv: Tensor, offsets: Tensor, prefix: int, heads: int, grad_q: Tensor, grad_kv: Tensor
) -> None:
    """Write the gradients of ``q`` and ``kv`` into ``grad_q`` and ``grad_kv``, given that of the result.

    The outputs have the shapes of ``q`` and ``kv`` and a dense last dimension; they may be halves of one [B, R, 3W], so
    that one matrix product takes the gradient on. Every element is written.
    """
    check_tensors(
        "prefix_attention_backward",
        differentiable=False,
        grad=grad,
        q=q,
        kv=kv,
        offsets=offsets,
        grad_q=grad_q,
        grad_kv=grad_kv,
    )
    _check(q, kv, offsets, prefix, heads)
    for name, t, like in (("grad", grad, q), ("grad_q", grad_q, q), ("grad_kv", grad_kv, kv)):
        if t.shape != like.shape or t.dtype != like.dtype:
            raise ValueError(f"{name}: expected {like.dtype} {list(like.shape)}, got {t.dtype} {list(t.shape)}")
    load.ensure(kv.device)
    torch.ops.tpt_fast.prefix_attention_backward(grad, q, kv, offsets, prefix, heads, grad_q, grad_kv)


def _check(q: Tensor, kv: Tensor, offsets: Tensor, prefix: int, heads: int) -> None:
    if kv.dtype not in FLOATING or q.dtype != kv.dtype:
        expected = " or ".join(map(str, FLOATING))
        raise TypeError(f"q, kv: expected both in {expected}, got {q.dtype} and {kv.dtype}")
    if kv.ndim != 3 or q.ndim != 3 or kv.shape[2] != 2 * q.shape[2] or kv.shape[0] != q.shape[0]:
        raise ValueError(f"q, kv: expected [B, R or C, W] and [B, R, 2W], got {list(q.shape)} and {list(kv.shape)}")
    if offsets.ndim != 1 or len(offsets) < 1 or offsets.dtype != torch.int64:
        raise ValueError(f"offsets: expected int64 [C + 1], got {offsets.dtype} {list(offsets.shape)}")
    if q.shape[1] not in (kv.shape[1], len(offsets) - 1):
        expected = f"{kv.shape[1]} rows, or {len(offsets) - 1} (one a class)"
        raise ValueError(f"q: expected {expected}, got {list(q.shape)}")
    maximum = min(kv.shape[1], _MAX_KEYS)
    if not 0 <= prefix <= maximum:
        raise ValueError(f"prefix: expected 0 to {maximum} (of {kv.shape[1]} rows), got {prefix}")
    if heads < 1 or q.shape[2] % heads:
        raise ValueError(f"heads: expected a divisor of the width {q.shape[2]}, got {heads}")
    if q.is_cuda and q.shape[2] // heads > MAX_CUDA_HEAD:
        raise ValueError(
            f"heads: expected heads of at most {MAX_CUDA_HEAD} on CUDA, got {heads} of {q.shape[2] // heads}"
        )
