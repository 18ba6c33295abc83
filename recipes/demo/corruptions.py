"""Ways to spoil an image, the same on every machine: the shifts that test-time tuning is meant to recover from."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

KINDS = ("clean", "blur", "noise", "contrast", "occlusion")

# One value for each severity 1..5; lengths are in parts of the shorter side, so that any image size works.
_BLUR_SIGMA = (0.015, 0.022, 0.03, 0.04, 0.05)
_NOISE_SIGMA = (0.04, 0.07, 0.1, 0.14, 0.2)
_CONTRAST = (0.6, 0.45, 0.3, 0.2, 0.12)
_OCCLUDED_SIDE = (0.25, 0.35, 0.45, 0.55, 0.65)


def corrupt(images: NDArray[np.uint8], kind: str, severity: int = 3, seed: int = 0) -> NDArray[np.uint8]:
    """A corrupted copy of images uint8 [N, H, W, 3].

    kind: one of ``KINDS``; severity: 1..5, ignored by ``clean``. Image i depends on ``(seed, i)`` alone, not on N.
    Raises ``ValueError`` for another kind, severity, dtype or shape.
    """
    if kind not in KINDS:
        raise ValueError(f"kind: expected one of {KINDS}, got {kind!r}")
    if not 1 <= severity <= 5:
        raise ValueError(f"severity: expected 1..5, got {severity}")
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != 3:
        raise ValueError(f"images: expected uint8 [N, H, W, 3], got {images.dtype} {images.shape}")
    if kind == "clean":
        return images.copy()
    spoil = {"blur": _blur, "noise": _noise, "contrast": _contrast, "occlusion": _occlusion}[kind]
    out = np.empty_like(images)
    for i, image in enumerate(images):
        spoilt = spoil(image.astype(np.float64), severity - 1, np.random.default_rng([seed, i]))
        out[i] = np.clip(np.rint(spoilt), 0, 255)
    return out


def _blur(image: NDArray, level: int, rng: np.random.Generator) -> NDArray:
    sigma = _BLUR_SIGMA[level] * min(image.shape[:2])
    reach = int(np.ceil(3 * sigma))
    taps = np.exp(-0.5 * (np.arange(-reach, reach + 1) / sigma) ** 2)
    taps /= taps.sum()
    for axis in (0, 1):
        padded = np.pad(image, [(reach, reach) if a == axis else (0, 0) for a in range(3)], mode="edge")
        image = sum(t * np.take(padded, range(k, k + image.shape[axis]), axis) for k, t in enumerate(taps))
    return image


def _noise(image: NDArray, level: int, rng: np.random.Generator) -> NDArray:
    return image + rng.normal(0, 255 * _NOISE_SIGMA[level], image.shape)


def _contrast(image: NDArray, level: int, rng: np.random.Generator) -> NDArray:
    mean = image.mean()
    return mean + _CONTRAST[level] * (image - mean)


def _occlusion(image: NDArray, level: int, rng: np.random.Generator) -> NDArray:
    """A square in the image's mean colour, at a random place within the image."""
    height, width = image.shape[:2]
    side = round(_OCCLUDED_SIDE[level] * min(height, width))
    top, left = rng.integers(height - side + 1), rng.integers(width - side + 1)
    out = image.copy()
    out[top : top + side, left : left + side] = image.mean((0, 1))
    return out
