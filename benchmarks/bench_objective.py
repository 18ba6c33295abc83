"""The objective against eager PyTorch and torch.compile, forward and backward."""

import math

import pytest
import torch
from timing import DEVICE, measure

from tpt_fast.ops import objective


def published(logits, n_selected):
    """The published formulas under autograd."""
    logits = logits.detach().requires_grad_()
    log_probs = logits.log_softmax(1)
    chosen = (-(log_probs.exp() * log_probs).sum(1)).argsort()[:n_selected]
    mean = log_probs[chosen].logsumexp(0) - math.log(n_selected)
    mean = mean.clamp(min=torch.finfo(mean.dtype).min)
    loss = -(mean.exp() * mean).sum()
    loss.backward()
    return loss.detach(), logits.grad[chosen]


def ours(logits, n_selected):
    found = objective(logits, n_selected)
    return found.loss, found.grad


BACKENDS = {
    "tpt_fast": lambda: ours,
    "eager": lambda: published,
    "torch.compile": lambda: torch.compile(published, dynamic=False),
}


@pytest.mark.parametrize("classes", [10, 200, 1000])
@pytest.mark.parametrize("backend", BACKENDS)
def test_objective(benchmark, backend, classes):
    logits, kept = 4 * torch.randn(64, classes, device=DEVICE), 6
    run = BACKENDS[backend]()
    for got, want in zip(run(logits, kept), published(logits.double(), kept)):
        torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-6)
    benchmark.extra_info.update(op="objective", case=f"64x{classes}", backend=backend)
    moved = 4 * classes * (64 + kept) if backend == "tpt_fast" else 0  # the logits, and the gradient of the kept ones
    measure(benchmark, run, (logits, kept), rounds=300, warmup_rounds=50, moved=moved)
