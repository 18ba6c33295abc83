"""Checks of arguments: each names the argument, what was expected and what came.

NumPy's scalars count as the Python numbers that they stand for.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Iterable, Sequence

MAX_SEED = 2**64 - 1  # that a generator takes


def check_integer(name: str, value: object, minimum: int, maximum: int | None = None) -> None:
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{name}: expected an int, got {type(value).__name__} {value!r}")
    number = int(value)
    if number < minimum or (maximum is not None and number > maximum):
        raise ValueError(f"{name}: expected {minimum} {'or more' if maximum is None else f'to {maximum}'}, got {value}")


def check_number(name: str, value: object, expected: str, fits: Callable[[float], bool]) -> None:
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name}: expected {expected}, got {type(value).__name__} {value!r}")
    number = float(value)
    if not math.isfinite(number) or not fits(number):
        raise ValueError(f"{name}: expected {expected}, got {value}")


def check_numbers(name: str, values: object, count: int) -> tuple[float, ...]:
    """``count`` finite numbers, as a tuple."""
    if isinstance(values, (str, bytes)) or not isinstance(values, Iterable):
        raise TypeError(f"{name}: expected {count} numbers, got {type(values).__name__} {values!r:.60}")
    # Of tensors and arrays the numbers in them; this module does without both libraries.
    result = tuple(value.item() if getattr(value, "ndim", None) == 0 else value for value in values)
    if len(result) != count:
        raise ValueError(f"{name}: expected {count} numbers, got {result!r:.60}")
    for value in result:
        check_number(name, value, f"{count} finite numbers", lambda _: True)
    return tuple(map(float, result))


def check_size(name: str, value: object) -> tuple[int, int]:
    """Pixels of a side, or (height, width), of a view: as a height and a width of 1 to 32768."""
    sides = (value, value) if isinstance(value, numbers.Integral) else value
    if not isinstance(sides, Sequence) or isinstance(sides, (str, bytes)) or len(sides) != 2:
        raise TypeError(f"{name}: expected an int or (height, width), got {type(value).__name__} {value!r:.60}")
    for side in sides:
        check_integer(name, side, 1, 1 << 15)
    return int(sides[0]), int(sides[1])


def check_patch(patch: int | None, height: int, width: int) -> None:
    if patch is None:
        return
    if patch < 1 or height % patch or width % patch:
        size = f"size {height}" if height == width else f"sizes {height} x {width}"
        raise ValueError(f"patch: expected a divisor of the {size}, got {patch}")


def check_choice(name: str, value: object, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ValueError(f"{name}: expected one of {', '.join(choices)}, got {value!r}")


def check_bool(name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{name}: expected True or False, got {type(value).__name__} {value!r}")
