"""Many strings in two arrays: a million paths as Python objects would be over a hundred megabytes."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator

import numpy as np


class Strings:
    """A sequence of strings, one after the other in UTF-8; :meth:`append` while it is being made."""

    def __init__(self, strings: Iterable[str] = ()) -> None:
        self._utf8 = bytearray()
        self._begins = array("q", [0])
        for each in strings:
            self.append(each)

    def append(self, string: str) -> None:
        self._utf8 += string.encode("utf-8", "surrogateescape")  # a file's name is any bytes
        self._begins.append(len(self._utf8))

    def __len__(self) -> int:
        return len(self._begins) - 1

    def __getitem__(self, i: int) -> str:
        i = range(len(self))[i]
        return self._utf8[self._begins[i] : self._begins[i + 1]].decode("utf-8", "surrogateescape")

    def __iter__(self) -> Iterator[str]:
        return map(self.__getitem__, range(len(self)))

    def content(self) -> tuple[bytes, bytes]:
        """What is the same for equal sequences, and for no others."""
        return bytes(self._utf8), np.asarray(self._begins, "<i8").tobytes()

    def first_repeat(self) -> tuple[int, int] | None:
        """Two places of one string, if there are any."""
        hashes = np.fromiter(map(hash, self), np.int64, len(self))
        order = np.argsort(hashes, kind="stable")
        for at in np.flatnonzero(np.diff(hashes[order]) == 0):  # equal hashes: most likely equal strings
            first, second = int(order[at]), int(order[at + 1])
            if self[first] == self[second]:
                return first, second
        return None
