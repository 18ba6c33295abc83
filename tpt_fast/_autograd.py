"""Autograd graphs, walked."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor


def graph_nodes(results: Iterable[Tensor]) -> Iterator[Any]:
    """Every node of the graphs that made ``results``, once. Those of leaves have a ``variable``."""
    waiting: list[Any] = [result.grad_fn for result in results]
    seen: set[Any] = {None}
    while waiting:
        node = waiting.pop()
        if node not in seen:
            seen.add(node)
            yield node
            waiting += [following for following, _ in node.next_functions]
