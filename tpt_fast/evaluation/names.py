"""Class names that stand beside a table or tars, and labels that are their places or themselves."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from . import checks

FILE = "classnames.txt"  #: one a line, in the order of the labels; CLIP_benchmark writes it too


def given(classnames: Sequence[str] | None, folders: Iterable[Path]) -> tuple[str, ...] | None:
    """The argument, or the file in the first of the folders that has it."""
    if classnames is not None:
        if isinstance(classnames, str) or not all(isinstance(each, str) and each.strip() for each in classnames):
            raise ValueError(f"classnames: expected names, none of them empty, got {classnames!r:.80}")
        return tuple(classnames)
    for folder in folders:
        file = folder / FILE
        if file.is_file():
            names = file.read_text("utf-8-sig").rstrip("\n").split("\n")
            names = [name.strip() for name in names]
            if "" in names:
                raise ValueError(f"line {names.index('') + 1} of {file} is blank: labels behind it would be shifted")
            return tuple(names)
    return None


class Labels:
    """From a column of labels to places in the list of names: all integers, or all names."""

    def __init__(self, where: object, names: tuple[str, ...] | None) -> None:
        self.where, self.names = where, names
        self._place = None if names is None else {name: i for i, name in enumerate(names)}
        self._met: dict[str, int] = {}  # different labels, in the order in which they come

    def meet(self, label: str) -> int:
        """A number for a label, until :meth:`resolve` says what it stands for."""
        return self._met.setdefault(label, len(self._met))

    def resolve(self) -> tuple[list[int], tuple[str, ...]]:
        """Of each number that :meth:`meet` gave the place in the names, and the names.

        Raises:
            ValueError: labels of both kinds, without names, out of range, unknown, or that two classes have.
        """
        met, names = list(self._met), self.names
        numbers = [each for each in met if _is_integer(each)]
        if numbers and len(numbers) < len(met):
            other = next(each for each in met if not _is_integer(each))
            raise ValueError(
                f"label: expected places of classes or their names, not both, in {self.where}; "
                f"got {numbers[0]!r} and {other!r}"
            )
        if numbers and self._place is not None and any(each in self._place for each in numbers):
            raise ValueError(f"label: {numbers[0]!r} in {self.where} may be the place of a class or one of the names")
        if numbers:
            places = [int(each) for each in met]
            if names is None:
                raise ValueError(
                    f"label: {self.where} has places of classes ({checks.some(sorted(places), 3)}) and no names: give "
                    f"classnames, or {FILE} beside it with one a line"
                )
            if min(places) < 0 or max(places) >= len(names):
                hint = "; do they begin at 1?" if min(places) == 1 and max(places) == len(names) else ""
                raise ValueError(
                    f"label: expected 0 to {len(names) - 1}, got {min(places)} to {max(places)} in {self.where}{hint}"
                )
            return places, names
        if names is None:
            names = tuple(sorted(met))
            self._place = {name: i for i, name in enumerate(names)}
        assert self._place is not None
        if unknown := sorted(each for each in met if each not in self._place):
            raise ValueError(
                f"label: {len(unknown)} in {self.where} are none of the class names: {checks.some(unknown)}"
            )
        if double := [each for each in met if names.count(each) > 1]:
            raise ValueError(f"label: two classes have the name {double[0]!r}: write places of classes in {self.where}")
        return [self._place[each] for each in met], names


def _is_integer(label: str) -> bool:
    return label.removeprefix("-").isdecimal()
