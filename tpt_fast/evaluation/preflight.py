"""Labels against what the model sees, before a run: the field's most frequent fault is a shifted list of classes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from .sets import ImageSet

_IMAGES, _PER_CLASS = 400, 4  # of the first look: as many classes as have so many images each
_SECOND = 16  # images of each class that seems to be another
_LISTED = 20  # lines of a map that are printed


@dataclass(frozen=True)
class Preflight:
    """What the zero-shot answers of some images say about the labels of a set."""

    name: str
    images: int
    accuracy: float
    permuted: dict[int, int]  #: label -> the class that its images look like; empty unless labels are permuted
    exchanged: tuple[tuple[int, int], ...]  #: pairs of classes, each of which looks like the other
    classnames: tuple[str, ...]

    @property
    def message(self) -> str | None:
        """What is wrong, with the map; None if nothing is."""
        seen = f"{self.name}: zero-shot, {100 * self.accuracy:.1f} % of {self.images} images are right"
        if self.permuted:
            lines = [
                f"  label {i} ({self._name(i)}) looks like {j} ({self._name(j)})" for i, j in self.permuted.items()
            ]
            more = [f"  and {len(lines) - _LISTED} more"] if len(lines) > _LISTED else []
            return "\n".join([f"{seen}, but the labels are permuted:", *lines[:_LISTED], *more])
        if self.exchanged:
            pairs = ", ".join(f"{i} ({self._name(i)}) and {j} ({self._name(j)})" for i, j in self.exchanged)
            return f"{seen}, but classes are exchanged: {pairs}"
        return None

    def check(self) -> None:
        """Raise a ValueError with the map if the labels are permuted. Exchanged pairs are told, and no reason to stop:
        classes may look alike, and Food101's list was published with such a pair."""
        if self.permuted:
            raise ValueError(self.message)

    def _name(self, i: int) -> str:
        return self.classnames[i]


def preflight(
    images: ImageSet,
    predict: Callable[[np.ndarray], npt.ArrayLike],
    *,
    seed: int = 0,
) -> Preflight:
    """Ask a model about a few hundred images of all classes, and again about classes that seem to be others.

    Args:
        images: of which only the labels and names are read here.
        predict: from places of images, int64 [n], to their classes, integers [n], or to logits [n, C].
        seed: of the choice of images.
    """
    labels = np.fromiter(map(images.label, range(len(images))), np.int64, len(images))
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(labels))
    asked = _choose(labels[order], max(1, _IMAGES // _PER_CLASS))
    asked = order[asked]
    answers = _answers(predict, asked, len(images.classnames))
    suspects = suspected(labels[asked], answers)
    if suspects:
        more = _more(labels, order, asked, sorted({*suspects, *suspects.values()}))
        answers = np.concatenate([answers, _answers(predict, more, len(images.classnames))])
        asked = np.concatenate([asked, more])
    permuted, exchanged = find_permutation(labels[asked], answers, images.classnames)
    accuracy = float((labels[asked] == answers).mean())
    return Preflight(images.name, len(asked), accuracy, permuted, exchanged, images.classnames)


def find_permutation(
    labels: np.ndarray, predictions: np.ndarray, classnames: Sequence[str] = ()
) -> tuple[dict[int, int], tuple[tuple[int, int], ...]]:
    """What the labels are mistaken for: the map of a permutation, if it is one, and exchanged pairs.

    A class looks like another if over half of its images, four or more, are answered so; that counts where no other
    class looks like the same one, for a weak model answers few classes for many labels. Labels are permuted if three
    or more are and over twice as many as look like themselves. Or, for one class that is missing shifts those behind
    it alone, if five or more, and a quarter as many as look like themselves, look like a class that looks like another
    in its turn; where similar classes are confused, the one that is answered mostly looks like itself. A pair is
    exchanged if each looks like the other.

    Args:
        labels, predictions: integers [n].
        classnames: those of one name count as one class.
    """
    first = {name: i for i, name in reversed(list(enumerate(classnames)))}
    if first:
        same = np.array([first[name] for name in classnames])
        labels, predictions = same[labels], same[predictions]
    likeness = _likeness(labels, predictions)
    moved = {i: j for i, j in likeness.items() if i != j}
    claimed = list(likeness.values())
    alone = {i: j for i, j in moved.items() if claimed.count(j) == 1}
    kept = len(likeness) - len(moved)
    pairs = tuple((i, j) for i, j in moved.items() if i < j and moved.get(j) == i)
    onwards = sum(j in moved for j in alone.values())
    shifted = onwards >= 5 and 4 * onwards >= kept
    permuted = alone if len(alone) >= 3 and (len(alone) > 2 * kept or shifted) else {}
    return permuted, pairs


def suspected(labels: np.ndarray, predictions: np.ndarray) -> dict[int, int]:
    """Classes that look like another."""
    return {i: j for i, j in _likeness(labels, predictions).items() if i != j}


def _likeness(labels: np.ndarray, predictions: np.ndarray) -> dict[int, int]:
    """Of each class with enough images, the class that over half of them are answered as."""
    found = {}
    for label in np.unique(labels):
        values, counts = np.unique(predictions[labels == label], return_counts=True)
        if counts.sum() >= _PER_CLASS and 2 * counts.max() > counts.sum():
            found[int(label)] = int(values[counts.argmax()])
    return found


def _choose(labels: np.ndarray, classes: int) -> np.ndarray:
    """Places of images, of up to ``classes`` classes equally many, in the order in which they stand."""
    _, first = np.unique(labels, return_index=True)
    chosen = labels[np.sort(first)[:classes]]  # as they come, so that of many classes a random part is asked about
    each = max(_PER_CLASS, _IMAGES // len(chosen))
    return np.sort(np.concatenate([np.flatnonzero(labels == label)[:each] for label in chosen]))


def _more(labels: np.ndarray, order: np.ndarray, asked: np.ndarray, classes: Sequence[int]) -> np.ndarray:
    """Further images of these classes, to have up to ``_SECOND`` of each."""
    mixed, already = labels[order], np.isin(order, asked)
    found = [np.empty(0, np.int64)]
    for label in classes:
        missing = max(0, _SECOND - int((labels[asked] == label).sum()))
        found.append(order[(mixed == label) & ~already][:missing])
    return np.concatenate(found)


def _answers(predict: Callable[[np.ndarray], npt.ArrayLike], places: np.ndarray, classes: int) -> np.ndarray:
    if not len(places):
        return np.empty(0, np.int64)
    found = np.asarray(predict(places))
    if found.ndim == 2:
        if found.shape != (len(places), classes):
            raise ValueError(f"predict: expected logits [{len(places)}, {classes}], got {list(found.shape)}")
        return found.argmax(1)
    if found.shape != (len(places),) or found.dtype.kind not in "iu":
        raise ValueError(f"predict: expected {len(places)} integers, got {found.dtype} {list(found.shape)}")
    return found.astype(np.int64)
