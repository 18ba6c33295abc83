"""Attention over packed rows against scaled_dot_product_attention over padded prompts, forward and backward."""

import packed
import pytest
import torch
from packed import CLASSES, HEADS, LAYOUT, LONGEST, ROWS, WIDTH
from timing import DEVICE, measure
from torch.nn.functional import scaled_dot_product_attention

from tpt_fast.ops.prefix_attention import prefix_attention, prefix_attention_backward


def ours(qkv, grad, _padded_qkv, _padded_grad):
    q, kv = qkv[:, :, :WIDTH], qkv[:, :, WIDTH:]
    out, grads = prefix_attention(q, kv, LAYOUT.offsets, LAYOUT.prefix, HEADS), torch.empty_like(qkv)
    prefix_attention_backward(
        grad, q, kv, LAYOUT.offsets, LAYOUT.prefix, HEADS, grads[:, :, :WIDTH], grads[:, :, WIDTH:]
    )
    return out, grads


def sdpa(_qkv, _grad, padded_qkv, padded_grad):
    leaf = padded_qkv.detach().requires_grad_()
    q, k, v = (t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in leaf.chunk(3, -1))
    out = scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
    return out.detach(), torch.autograd.grad(out, leaf, padded_grad)[0]


BACKENDS = {"tpt_fast": ours, "SDPA, padded": sdpa}


@pytest.mark.parametrize("backend", BACKENDS)
def test_prefix_attention(benchmark, backend):
    torch.manual_seed(0)
    qkv, grad = (torch.randn(1, ROWS, n * WIDTH, device=DEVICE) for n in (3, 1))
    padded_grad = packed.padded(grad[0])
    padded_grad[1:, : LAYOUT.prefix] = 0  # the prefix's gradient counts once
    given = qkv, grad, packed.padded(qkv[0]), padded_grad
    out, grads = BACKENDS[backend](*given)
    want, want_grads = sdpa(*(t.double() for t in given))
    if backend == "tpt_fast":
        want, shared = packed.packed(want), want_grads[:, : LAYOUT.prefix].sum(0)
        want_grads = torch.cat([shared, packed.packed(want_grads)[LAYOUT.prefix :]])
        out, grads = out[0], grads[0]
    torch.testing.assert_close(out.double(), want, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(grads.double(), want_grads, rtol=1e-4, atol=1e-4)
    case = f"{ROWS} packed or {CLASSES}x{LONGEST} padded rows, {HEADS} heads"
    benchmark.extra_info.update(op="prefix_attention", case=case, backend=backend)
    moved = 4 * WIDTH * ROWS * (4 + 7) if backend == "tpt_fast" else 0  # qkv, out; grad, qkv, grad of qkv
    measure(benchmark, BACKENDS[backend], given, rounds=40, warmup_rounds=5, moved=moved)
