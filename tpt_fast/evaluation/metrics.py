"""Metrics as functions of arrays: accuracy, calibration, risk, intervals between methods. NumPy and nothing else."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

BINS = (15, 20)  #: of the calibration error: Guo et al. (2017), and C-TPT's published code
RESAMPLES = 10_000


class Bins(NamedTuple):
    """Images by confidence, in bins of equal width that hold their upper edge: arrays [bins]."""

    images: np.ndarray
    accuracy: np.ndarray  #: NaN where there is no image
    confidence: np.ndarray  #: mean; NaN likewise


class Interval(NamedTuple):
    """A difference in accuracy on the same images, and where it may lie."""

    difference: float
    low: float
    high: float
    images: int
    gained: int  #: answers that only the one had right
    lost: int  #: answers that only the other had right


def top(rank: np.ndarray, k: int) -> float:
    """Share of images whose right class is among the ``k`` most probable; NaN of none."""
    return float(((rank >= 0) & (rank < k)).mean()) if len(rank) else float("nan")


def calibration(confidence: np.ndarray, right: np.ndarray, bins: int) -> Bins:
    """Accuracy and mean confidence by bins (lo, hi] of equal width, see :func:`edges`.

    A confidence of exactly 0 is in none.
    """
    place = np.searchsorted(edges(bins), confidence.astype(np.float32), side="left") - 1
    inside = (place >= 0) & (place < bins)
    place = place[inside]
    count = np.bincount(place, minlength=bins)
    with np.errstate(invalid="ignore"):
        accuracy = np.bincount(place, right[inside].astype(np.float64), bins) / count
        mean = np.bincount(place, confidence[inside].astype(np.float64), bins) / count
    return Bins(count, accuracy, mean)


def edges(bins: int) -> np.ndarray:
    """float32 [bins + 1] from 0 to 1: those of ``torch.linspace``, which the published codes have, to the bit.

    From the middle on it counts down from 1, and rounds once; NumPy's differ in places, and confidences lie on edges.
    """
    step, i = np.float32(1) / np.float32(bins), np.arange(bins + 1)
    down = (1 - np.float64(step) * (bins - i)).astype(np.float32)
    return np.where(i < (bins + 1) // 2, step * i.astype(np.float32), down)


def ece(confidence: np.ndarray, right: np.ndarray, bins: int = 15) -> float:
    """Expected calibration error: the mean over images of ``|accuracy - confidence|`` of their bin; NaN of no image."""
    if not len(confidence):
        return float("nan")
    found = calibration(confidence, right, bins)
    gap = np.nan_to_num(np.abs(found.accuracy - found.confidence))
    return float((gap * found.images).sum() / len(confidence))


def aurc(confidence: np.ndarray, right: np.ndarray) -> float:
    """Area under the risk-coverage curve: the mean, over k, of the share of errors among the k most confident images.

    Of images that tie the mean over their orders is taken, so that the order of the rows does not count. NaN of none.
    """
    if not len(confidence):
        return float("nan")
    order = np.argsort(-confidence, kind="stable")
    errors = np.concatenate([[0], np.cumsum(~right[order].astype(bool))])
    ends = np.concatenate([[0], np.flatnonzero(np.diff(confidence[order])) + 1, [len(order)]])
    k = np.arange(1, len(order) + 1)
    return float((np.interp(k, ends, errors[ends]) / k).mean())


def per_class(label: np.ndarray, right: np.ndarray, classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Images of each class, and the share that is right (NaN of none): int64 and float64 [classes]."""
    count = np.bincount(label, minlength=classes)
    with np.errstate(invalid="ignore"):
        return count, np.bincount(label, right.astype(np.float64), classes) / count


def over_seeds(values: list[float]) -> tuple[float, float]:
    """Mean, and the standard deviation of a sample (n - 1); NaN of one seed."""
    array = np.asarray(values, np.float64)
    return float(array.mean()), float(array.std(ddof=1)) if len(array) > 1 else float("nan")


def paired(right: np.ndarray, other: np.ndarray, level: float = 0.95) -> Interval:
    """How much more often one method is right than another on the same images: a paired bootstrap over images.

    The interval is that of the percentiles of 10,000 resamples, drawn by one fixed seed. Differences of an image take
    few values, so a resample is one multinomial draw of how often each comes.

    Args:
        right: [images] or [images, seeds], whether the one is right; an image is drawn with all its seeds.
        other: likewise.
    """
    right, other = (np.asarray(each, bool).reshape(len(each), -1) for each in (right, other))
    gained, lost = int((right & ~other).sum()), int((other & ~right).sum())
    n, seeds = right.shape
    if not n:
        return Interval(float("nan"), float("nan"), float("nan"), 0, 0, 0)
    sums, counts = np.unique(right.sum(1) - other.sum(1, dtype=np.int64), return_counts=True)
    drawn = np.random.default_rng(0).multinomial(n, counts / n, RESAMPLES) @ sums / (n * seeds)
    low, high = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2])
    return Interval((gained - lost) / (n * seeds), float(low), float(high), n, gained, lost)
