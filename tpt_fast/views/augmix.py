"""AugMix: drawing its operations and weights as the published code draws them, and saying them as the op's steps."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .._checks import MAX_SEED, check_integer, check_size
from ..reference.augmix import AFFINE, AUTOCONTRAST, CHAINS, EQUALIZE, NOTHING, PARAMETERS, POSTERIZE, SOLARIZE

#: The operations in the order of the published list.
OPERATIONS = (
    *("autocontrast", "equalize", "posterize", "rotate", "solarize"),
    *("shear_x", "shear_y", "translate_x", "translate_y"),
)
LONGEST = 3  #: operations of a chain, at most
_WITHOUT_LEVEL = ("autocontrast", "equalize")
_SIGNED = ("rotate", "shear_x", "shear_y", "translate_x", "translate_y")


class AugMix(NamedTuple):
    """What AugMix draws for n views of one image: :func:`draw_augmix` makes it, and one's own will do.

    A number that an operation does not need is NaN, and nobody reads it.
    """

    weights: np.ndarray  #: float32 [n, 4]: m of the crop itself, and w of each chain
    operation: np.ndarray  #: int [n, 3, 3]: places in :data:`OPERATIONS`; -1 where a chain is shorter
    level: np.ndarray  #: float64 [n, 3, 3], 0.1 to 1: how strong; shears and what follows the level are linear in it
    sign: np.ndarray  #: float64 [n, 3, 3], 0 to 1: to the one side, or, from above a half, to the other


def draw_augmix(n: int, *, seed: int | None = 0) -> AugMix:
    """Draw weights, chains and levels of ``n`` views as the published code draws them, view by view.

    The numbers are those of NumPy's global generator after ``numpy.random.seed(seed)``.

    Args:
        n: number of views, 0 or more.
        seed: of a generator of its own, 0 to 2**64 - 1 (from 2**32 on, which NumPy's takes in two halves); None draws
            from NumPy's global one, as the published code does.

    Raises:
        ValueError: an argument out of range.
        TypeError: an argument of another type.
    """
    check_integer("n", n, 0)
    source: Any = np.random
    if seed is not None:
        check_integer("seed", seed, 0, MAX_SEED)
        seed = int(seed)
        source = np.random.RandomState(seed if seed < 1 << 32 else [seed & 0xFFFFFFFF, seed >> 32])
    weights = np.empty((n, 1 + CHAINS), np.float32)
    operation = np.full((n, CHAINS, LONGEST), -1)
    level, sign = np.full((2, n, CHAINS, LONGEST), np.nan)
    for view in range(n):
        weights[view, 1:] = source.dirichlet([1.0] * CHAINS)
        weights[view, 0] = source.beta(1.0, 1.0)
        for chain in range(CHAINS):
            for place in range(source.randint(1, LONGEST + 1)):
                at = view, chain, place
                operation[at] = chosen = source.randint(0, len(OPERATIONS))
                if OPERATIONS[chosen] not in _WITHOUT_LEVEL:
                    level[at] = source.uniform(0.1, 1.0)
                if OPERATIONS[chosen] in _SIGNED:
                    sign[at] = source.uniform()
    return AugMix(weights, operation, level, sign)


def augmix_steps(draws: AugMix, size: int | tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
    """``steps``, ``parameters`` and ``weights`` for :func:`tpt_fast.ops.augmix`: view 0, which is not mixed, and then
    one view a draw.

    Args:
        draws: of n views.
        size: S, or (height, width), of the views.

    Returns:
        int32 [n + 1, 3, 3], float64 [n + 1, 3, 3, 6] and float32 [n + 1, 4].

    Raises:
        ValueError: draws of other shapes, or an operation, level or sign out of range.
    """
    height, width = check_size("size", size)
    weights, operation, level, sign = _checked(draws)
    n = len(weights)
    steps = np.full((n + 1, CHAINS, LONGEST), NOTHING, np.int32)
    parameters = np.zeros((n + 1, CHAINS, LONGEST, PARAMETERS))
    for at in np.argwhere(operation >= 0).tolist():
        place = tuple(at)
        kind, values = _step(OPERATIONS[operation[place]], float(level[place]), float(sign[place]) > 0.5, height, width)
        steps[at[0] + 1, at[1], at[2]] = kind
        parameters[at[0] + 1, at[1], at[2], : len(values)] = values
    own = np.concatenate([np.array([[1, 0, 0, 0]], np.float32), weights])
    return torch.from_numpy(steps), torch.from_numpy(parameters), torch.from_numpy(own)


def _checked(draws: AugMix) -> AugMix:
    if not isinstance(draws, tuple) or len(draws) != len(AugMix._fields):
        raise TypeError(f"augmix: expected an AugMix of {', '.join(AugMix._fields)}, got {type(draws).__name__}")
    weights, operation, level, sign = draws = AugMix(*map(np.asarray, draws))
    n = len(weights) if weights.ndim else 0
    for name, array in draws._asdict().items():
        shape = (n, 1 + CHAINS) if name == "weights" else (n, CHAINS, LONGEST)
        if array.shape != shape or array.dtype.kind not in ("iu" if name == "operation" else "f"):
            kind = "integers" if name == "operation" else "floating point"
            raise ValueError(f"augmix.{name}: expected {kind} {list(shape)}, got {array.dtype} {list(array.shape)}")
    names = np.array([*OPERATIONS, ""])  # the last one, at -1, has neither
    if ((operation < -1) | (operation >= len(OPERATIONS))).any():
        raise ValueError(
            f"augmix.operation: expected -1 to {len(OPERATIONS) - 1}, got {operation.min()} to {operation.max()}"
        )
    chosen = names[operation]
    with_level, signed = ~np.isin(chosen, (*_WITHOUT_LEVEL, "")), np.isin(chosen, _SIGNED)
    for name, values, needed, low, high in (
        ("weights", weights, np.isfinite(weights) | True, 0, 1),
        ("level", level, with_level, 0, 1),
        ("sign", sign, signed, 0, 1),
    ):
        wrong = values[needed & ~((values >= low) & (values <= high))]
        if wrong.size:
            raise ValueError(f"augmix.{name}: expected numbers from {low} to {high}, got {wrong[0]}")
    return AugMix(weights.astype(np.float32, copy=False), operation, level, sign)


def _step(operation: str, level: float, negative: bool, height: int, width: int) -> tuple[int, tuple[float, ...]]:
    """The op's step and its parameters, in the published code's own arithmetic: ``int(level * most / 10)``."""

    def signed(value: float) -> float:
        return -value if negative else value

    if operation == "autocontrast":
        return AUTOCONTRAST, ()
    if operation == "equalize":
        return EQUALIZE, ()
    if operation == "posterize":
        return POSTERIZE, (4 - int(level * 4 / 10),)
    if operation == "solarize":
        return SOLARIZE, (256 - int(level * 256 / 10),)
    if operation == "rotate":
        return _rotation(signed(int(level * 30 / 10)), height, width)
    if operation in ("shear_x", "shear_y"):
        by = signed(level * 0.3 / 10)
        return AFFINE, (1, by, 0, 0, 1, 0) if operation == "shear_x" else (1, 0, 0, by, 1, 0)
    along = width if operation == "translate_x" else height
    by = signed(int(level * (along / 3) / 10))
    return AFFINE, (1, 0, by, 0, 1, 0) if operation == "translate_x" else (1, 0, 0, 0, 1, by)


def _rotation(degrees: float, height: int, width: int) -> tuple[int, tuple[float, ...]]:
    """About the middle of the image, as Pillow does it: cosine and sine rounded to 15 decimals."""
    angle = degrees % 360.0
    if angle == 0:
        return NOTHING, ()
    radians, across, down = -math.radians(angle), width / 2, height / 2
    cosine, sine, minus_sine = (
        round(value, 15) for value in (math.cos(radians), math.sin(radians), -math.sin(radians))
    )
    x = cosine * -across + sine * -down + 0.0 + across
    y = minus_sine * -across + cosine * -down + 0.0 + down
    return AFFINE, (cosine, sine, x, minus_sine, cosine, y)
