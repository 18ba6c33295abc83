"""Checks of arguments: each names the argument, what was expected and what came."""

from __future__ import annotations

import math

MAX_SEED = 2**64 - 1  # that a generator takes


def check_integer(name: str, value: object, least: int, most: int | None = None) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: expected an int, got {type(value).__name__} {value!r}")
    if value < least or (most is not None and value > most):
        raise ValueError(f"{name}: expected {least} {'or more' if most is None else f'to {most}'}, got {value}")


def check_number(name: str, value: object, expected: str, fits) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: expected {expected}, got {type(value).__name__} {value!r}")
    if not math.isfinite(value) or not fits(value):
        raise ValueError(f"{name}: expected {expected}, got {value}")


def check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name}: expected one of {', '.join(choices)}, got {value!r}")
