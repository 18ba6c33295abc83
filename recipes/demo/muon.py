"""Muon: momentum whose update is orthogonalised, here for the filters of convolutions that a batch norm follows.

It learns more from each image than SGD or AdamW, which is what counts when two cores have to do the training. K. Jordan
et al., "Muon: An optimizer for hidden layers in neural networks", 2024. ``torch.optim.Muon`` takes matrices alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor


class Muon(torch.optim.Optimizer):
    """Filters [out, in, h, w] as matrices [out, in h w].

    A batch norm takes a filter's length out again, so filters are kept at a mean square length of 1 instead of decayed,
    and ``lr`` is by how much of that a step may move them. ``over``: ``map``, or that of a pool of threads.
    """

    def __init__(self, params: Iterable[Tensor], lr: float, momentum: float = 0.9, over: Callable = map) -> None:
        self.over = over
        super().__init__(params, dict(lr=lr, momentum=momentum))

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        work = [(p, group) for group in self.param_groups for p in group["params"]]
        for _ in self.over(lambda item: self._update(*item), sorted(work, key=lambda item: -item[0].numel())):
            pass

    @torch.no_grad()  # of a thread of its own
    def _update(self, p: Tensor, group: dict) -> None:
        buffer = self.state[p].setdefault("momentum", torch.zeros_like(p))
        buffer.lerp_(p.grad, 1 - group["momentum"])
        update = orthogonalise(p.grad.lerp(buffer, group["momentum"]).flatten(1))
        p.mul_(len(p) ** 0.5 / p.norm()).add_(update.view(p.shape), alpha=-group["lr"])


def orthogonalise(matrix: Tensor, steps: int = 5) -> Tensor:
    """Push the singular values of [m, n] towards 1 by Newton-Schulz iteration, in bfloat16 (they end in 0.7..1.2)."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = (matrix / (matrix.norm() + 1e-7)).bfloat16()
    wide = x.shape[0] <= x.shape[1]
    x = (x if wide else x.T).contiguous()
    for _ in range(steps):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x if wide else x.T).to(matrix.dtype)
