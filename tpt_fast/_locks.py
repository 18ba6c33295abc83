"""A lock for objects that are copied and sent to other processes."""

from __future__ import annotations

import threading


class Lock:
    """``threading.Lock`` for ``with``; what holds one can be copied and pickled, and the copy has its own."""

    def __init__(self) -> None:
        self._lock = threading.Lock()

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, *_error: object) -> None:
        self._lock.release()

    def __reduce__(self) -> tuple[type[Lock], tuple[()]]:
        return Lock, ()
