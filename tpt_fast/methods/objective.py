"""An objective of the user's own: a function of one image's logits, differentiated by torch."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .._autograd import graph_nodes
from ..text.classes import Classes

#: Of the logits [N, C] of one image's views; or of these and the class features [C, D]; or of these and the features
#: of the views [N, D]. Both features have length 1. It returns a scalar.
ObjectiveFunction = Callable[..., Tensor]


class Gradient(NamedTuple):
    """Of B images."""

    loss: Tensor  #: [B]
    logits: Tensor  #: [B, N, C], of the loss
    features: Tensor  #: [B, C, D], of the loss, where it reads them itself


def check_objective(objective: Any) -> None:
    """Raise a TypeError unless ``objective`` is a function of one, two or three arguments."""
    expected = "a function of the logits, or (logits, text_features), or (logits, text_features, image_features)"
    if not callable(objective):
        raise TypeError(f"objective: expected {expected}, got {type(objective).__name__}")
    if not 1 <= _arguments(objective) <= 3:
        raise TypeError(f"objective: expected {expected}, got one of {inspect.signature(objective)}")


def _arguments(objective: ObjectiveFunction) -> int:
    """How many it asks for: those by place that have no default."""
    try:
        found = inspect.signature(objective.forward if isinstance(objective, nn.Module) else objective).parameters
    except ValueError:  # of code that is not Python's
        return 1
    places = [each for each in found.values() if each.kind in (each.POSITIONAL_ONLY, each.POSITIONAL_OR_KEYWORD)]
    needed = sum(each.default is each.empty for each in places)
    more = any(each.kind is each.VAR_POSITIONAL for each in found.values()) or bool(places)
    return max(needed, 1) if more else needed


def differentiate(
    objective: ObjectiveFunction, logits: Tensor, features: Tensor, images: Tensor, classes: Classes
) -> Gradient:
    """The loss of each image and its gradients.

    Args:
        logits: [B, N, C].
        features: of the different names, [U, D] or [B, U, D].
        images: [B, N, D], of length 1.
    """
    asks, found = _arguments(objective), []
    features = classes.expand(features).expand(len(logits), -1, -1)
    for one, text, image in zip(logits, features, images, strict=True):
        with torch.enable_grad():
            leaves = [each.detach().clone().requires_grad_() for each in (one, text)]  # it may write to them
            loss = objective(*[*leaves, image.detach().clone()][:asks])
            if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.is_floating_point():
                got = f"{loss.dtype} {list(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
                raise ValueError(f"objective: expected it to return a scalar tensor, got {got}")
            grads = torch.autograd.grad(loss, leaves, allow_unused=True) if loss.requires_grad else (None, None)
            if grads == (None, None):
                what = "the logits" if asks == 1 else "the logits or the class features"
                raise ValueError(f"objective: expected it to depend on {what}, got a tensor without a gradient")
            reached = [node.variable for node in graph_nodes([loss]) if hasattr(node, "variable")]
            others = [other for other in reached if not any(other is leaf for leaf in leaves)]
            if others:
                shapes = ", ".join(str(list(other.shape)) for other in others[:3])
                raise ValueError(
                    "objective: expected a function of its arguments alone, got one whose loss also depends on "
                    f"{len(others)} other tensors with a gradient ({shapes}): their part would be lost. Class features "
                    "come as the second argument: def objective(logits, text_features, image_features). Detach others"
                )
        parts = (torch.zeros_like(leaf) if grad is None else grad for leaf, grad in zip(leaves, grads, strict=True))
        found.append((loss.detach().reshape(()), *parts))
    return Gradient(*map(torch.stack, zip(*found, strict=True)))
