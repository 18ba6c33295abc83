"""The first step of a fresh optimizer on one context, against torch.optim.AdamW as the published loop uses it."""

import pytest
import torch
from timing import DEVICE, measure

from tpt_fast.ops import adamw_step


def ours(ctx, grad):
    return adamw_step(ctx, grad).context


def pytorch(ctx, grad):
    leaf = ctx.clone().requires_grad_()
    leaf.grad = grad
    torch.optim.AdamW([leaf], lr=5e-3).step()
    return leaf.detach()


BACKENDS = {"tpt_fast": ours, "torch.optim.AdamW": pytorch}


@pytest.mark.parametrize("images", [1, 8])
@pytest.mark.parametrize("backend", BACKENDS)
def test_adamw_step(benchmark, backend, images):
    ctx, grad = torch.randn(2, images, 4, 512, device=DEVICE)
    torch.testing.assert_close(ours(ctx, grad), pytorch(ctx, grad), rtol=1e-6, atol=1e-6)
    benchmark.extra_info.update(op="adamw_step", case=f"{images} of 4x512", backend=backend)
    measure(benchmark, BACKENDS[backend], (ctx, grad), rounds=300, warmup_rounds=50)
