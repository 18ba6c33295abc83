"""Attention over packed rows against scaled_dot_product_attention over padded prompts, forward and backward."""

import packed
import pytest
import torch
from packed import HEADS, LAYOUT, ROWS, WIDTH
from timing import DEVICE, measure
from torch.nn.functional import scaled_dot_product_attention

from tpt_fast.ops.prefix_attention import prefix_attention, prefix_attention_backward
from tpt_fast.reference import prefix_attention as reference


def ours(qkv, grad, _padded_qkv, _padded_grad):
    q, kv = qkv[:, :, :WIDTH], qkv[:, :, WIDTH:]
    out, grads = prefix_attention(q, kv, LAYOUT.offsets, LAYOUT.prefix, HEADS), torch.empty_like(qkv)
    prefix_attention_backward(
        grad, q, kv, LAYOUT.offsets, LAYOUT.prefix, HEADS, grads[:, :, :WIDTH], grads[:, :, WIDTH:]
    )
    return out, grads


def plain(qkv, grad, _padded_qkv, _padded_grad):
    q, kv, layout = qkv[:, :, :WIDTH], qkv[:, :, WIDTH:], (LAYOUT.offsets, LAYOUT.prefix, HEADS)
    grad_q, grad_kv = torch.empty_like(grad), torch.empty_like(kv)
    out = reference.prefix_attention(q, kv, *layout)
    reference.prefix_attention_backward(grad, q, kv, *layout, grad_q, grad_kv)
    return out, torch.cat([grad_q, grad_kv], -1)


def sdpa(_qkv, _grad, padded_qkv, padded_grad):
    leaf = padded_qkv.detach().requires_grad_()
    q, k, v = (t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in leaf.chunk(3, -1))
    out = scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
    return out.detach(), torch.autograd.grad(out, leaf, padded_grad)[0]


BACKENDS = {"tpt_fast": ours, "SDPA, padded": sdpa, "torch.compile, packed": torch.compile(plain, dynamic=False)}


@pytest.mark.parametrize("dtype", packed.BOUNDS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_prefix_attention(benchmark, backend, dtype):
    torch.manual_seed(0)
    qkv, grad = (torch.randn(1, ROWS, n * WIDTH, device=DEVICE).to(dtype) for n in (3, 1))
    padded_grad = packed.padded(grad[0])
    padded_grad[1:, : LAYOUT.prefix] = 0  # the prefix's gradient counts once
    given, bound = (qkv, grad, packed.padded(qkv[0]), padded_grad), packed.BOUNDS[dtype]
    out, grads = BACKENDS[backend](*given)
    want, want_grads = sdpa(*(t.double() for t in given))
    if "padded" not in backend:
        want, shared = packed.packed(want), want_grads[:, : LAYOUT.prefix].sum(0)
        want_grads = torch.cat([shared, packed.packed(want_grads)[LAYOUT.prefix :]])
        out, grads = out[0], grads[0]
    torch.testing.assert_close(out.double(), want, rtol=bound, atol=bound)
    torch.testing.assert_close(grads.double(), want_grads, rtol=bound, atol=bound)
    benchmark.extra_info.update(op="prefix_attention", case=packed.case(f"rows, {HEADS} heads", dtype), backend=backend)
    # qkv, out; grad, qkv, grad of qkv
    moved = dtype.itemsize * WIDTH * ROWS * (4 + 7) if backend == "tpt_fast" else 0
    # Two products of a query with each of its keys and values forward, five backward; 2 operations an element.
    flops = 2 * (2 + 5) * WIDTH * pairs() if backend == "tpt_fast" else 0
    measure(benchmark, BACKENDS[backend], given, rounds=40, warmup_rounds=5, moved=moved, flops=flops)


def pairs():
    """Of a query and a key that it sees."""
    lengths = LAYOUT.offsets.diff()
    own = (lengths * (lengths + 1) // 2 + lengths * LAYOUT.prefix).sum()
    return int(own) + LAYOUT.prefix * (LAYOUT.prefix + 1) // 2
