"""Whether two ways that were timed give the same answer."""

from __future__ import annotations

import torch

from ..methods.published import Outcome
from ..result import TuneResult

#: Of the greatest magnitude in the published answer; bf16 has three bits fewer than fp16.
BOUNDS = {
    "fp32": {"zero_shot_logits": 1e-4, "entropies": 1e-4, "logits": 1e-3, "grad": 1e-3},
    "fp16": {"zero_shot_logits": 2e-2},
    "bf16": {"zero_shot_logits": 8 * 2e-2},
}


class Disagreement(Exception):
    """The answers differ by more than rounding; the message names what differs, and by how much."""


def compare(ours: TuneResult, published: Outcome, precision: str) -> dict[str, float]:
    """Hold our answer to the published one.

    In half precision both round in places of their own, and kept views, gradient and tuned logits may differ: there
    only the logits before tuning are compared. So are they, with the entropies, where two views are so equally certain
    that rounding decides which one is kept.

    Returns:
        What was compared -> the greatest difference, over the greatest magnitude in the published answer.

    Raises:
        Disagreement: one of them is above the bound, or the views we kept are not the most certain of ours.
    """
    bounds = BOUNDS[precision]
    if precision == "fp32":
        kept = ours.entropies[ours.selected]
        if not torch.equal(kept, ours.entropies.sort().values[: len(kept)]):
            raise Disagreement(
                f"selected: expected the {len(kept)} views of lowest entropy, got {ours.selected.tolist()}"
            )
        if sorted(ours.selected.tolist()) != sorted(published.selected.tolist()):
            bounds = {name: bounds[name] for name in ("zero_shot_logits", "entropies")}
    found = {}
    for name, bound in bounds.items():
        got, want = getattr(ours, name), getattr(published, name).float().cpu()
        found[name] = ((got - want).abs().max() / want.abs().max()).item()
        if not found[name] <= bound:  # NaN is not either
            raise Disagreement(
                f"{name}: expected the published answer within {bound:g} of its greatest magnitude, "
                f"got a difference of {found[name]:.2g}"
            )
    return found
