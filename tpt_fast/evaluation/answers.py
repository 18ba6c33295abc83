"""What a row says of one method's answer."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from ..result import TuneResult

ZERO_SHOT = "zero_shot"  #: the method that all others are held against


class Outcome(NamedTuple):
    """Of one image: a result with the features that it was made of, or why there is none."""

    result: TuneResult | None = None
    features: Tensor | None = None
    error: str = ""
    kept: bool = False  #: whether the features were there already


def answers(outcome: Outcome, methods: tuple[str, ...], label: int) -> dict[str, dict[str, Any]]:
    """By method the columns of its row that the answer fills."""
    if outcome.result is None:
        return {method: _failed(outcome.error) for method in methods}
    made = {}
    for method, result in outcome.result.by_method.items():
        made[method] = answer = _answer(result.logits, label)
        if answer["error"] is None:
            answer["status"], extra = result.status, result.extra
            answer["entropy_before"], answer["entropy_after"] = extra.get("loss"), extra.get("loss_after")
            if answer["prediction"] != int(result.zero_shot_logits.numpy().argmax()):  # what a report shows
                answer |= {name: extra[name].tolist() for name in ("entropies", "selected") if name in extra}
    return made


def _answer(logits: Tensor, label: int) -> dict[str, Any]:
    values = logits.numpy()
    if np.isnan(values).any():
        return _failed("logits: expected numbers, got NaN")
    prediction = int(values.argmax())  # of equal ones the first, as in TuneResult.topk
    probs = logits.softmax(-1).numpy()
    before = int((values > values[label]).sum() + (values[:label] == values[label]).sum())
    found = {"prediction": prediction, "confidence": float(probs[prediction]), "label_prob": float(probs[label])}
    return found | {"rank": before, "status": "tuned", "error": None}


def _failed(error: str) -> dict[str, Any]:
    nothing = float("nan")
    found = {"prediction": -1, "confidence": nothing, "label_prob": nothing, "rank": -1}
    return found | {"status": "failed", "error": error}
