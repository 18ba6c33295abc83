"""Causal attention of many suffixes that share one prefix, rows packed without padding."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def prefix_attention(q: Tensor, kv: Tensor, offsets: Tensor, prefix: int, heads: int) -> Tensor:
    """See :func:`tpt_fast.ops.prefix_attention`."""
    index, allowed = _keys(offsets, prefix, rows=kv.shape[1], queries=q.shape[1])
    q, k, v = _split(q, heads), *(_split(t, heads)[:, index] for t in kv.chunk(2, -1))
    probs = _probs(q, k, allowed)
    return torch.einsum("bqhk,bqkhd->bqhd", probs, v).flatten(-2).to(kv.dtype)


def prefix_attention_backward(
    grad: Tensor, q: Tensor, kv: Tensor, offsets: Tensor, prefix: int, heads: int, grad_q: Tensor, grad_kv: Tensor
) -> None:
    """Writes the gradients of ``q`` and ``kv`` into ``grad_q`` and ``grad_kv``."""
    rows = kv.shape[1]
    index, allowed = _keys(offsets, prefix, rows, queries=q.shape[1])
    grad, queries = _split(grad, heads), _split(q, heads)
    k, v = (_split(t, heads)[:, index] for t in kv.chunk(2, -1))
    probs = _probs(queries, k, allowed)
    slope = torch.einsum("bqhd,bqkhd->bqhk", grad, v)
    slope = probs * (slope - (probs * slope).sum(-1, keepdim=True)) / math.sqrt(k.shape[-1])
    grad_q.copy_(torch.einsum("bqhk,bqkhd->bqhd", slope, k).flatten(-2))
    parts = torch.einsum("bqhk,bqhd->bqkhd", slope, queries), torch.einsum("bqhk,bqhd->bqkhd", probs, grad)
    for part, out in zip(parts, grad_kv.chunk(2, -1), strict=True):
        total = part.new_zeros(len(part), rows, part.shape[-2] * part.shape[-1])
        out.copy_(total.index_add_(1, index.flatten(), part.flatten(1, 2).flatten(-2)))


def _keys(offsets: Tensor, prefix: int, rows: int, queries: int) -> tuple[Tensor, Tensor]:
    """For each query the rows [Q, prefix + longest] of its keys, and which of those places are keys [Q, 1, ...]."""
    device, classes = offsets.device, len(offsets) - 1
    row = torch.arange(rows, device=device)
    start = torch.cat([row[:prefix] + 1, offsets[:-1].repeat_interleave(offsets.diff(), output_size=rows - prefix)])
    if queries == classes and queries != rows:  # only each suffix's last row asks
        last = offsets[1:] - 1
        row, start = last, start[last]
    longest = int(offsets.diff().max()) if classes else 0
    own = start[:, None] + torch.arange(longest, device=device)
    shared = torch.arange(prefix, device=device).expand(len(row), -1)
    index = torch.cat([shared, own], 1)
    allowed = index <= row[:, None]
    return torch.where(allowed, index, 0), allowed[:, None]


def _split(x: Tensor, heads: int) -> Tensor:
    return (x if x.dtype == torch.float64 else x.float()).unflatten(-1, (heads, -1))


def _probs(q: Tensor, k: Tensor, allowed: Tensor) -> Tensor:
    scores = torch.einsum("bqhd,bqkhd->bqhk", q, k) / math.sqrt(q.shape[-1])
    return scores.masked_fill(~allowed, -torch.inf).softmax(-1)
