"""What a Tuner holds in memory, and why: found by walking from its parts to the storages they keep alive."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from types import FunctionType, MethodType, ModuleType
from typing import Any

from torch import Tensor, nn


@dataclass(frozen=True)
class Held:
    """Bytes of one part."""

    own: int  #: allocated for the Tuner
    shared: int  #: the model's own storages
    why: str


class Memory(dict[str, Held]):
    """Part -> :class:`Held`. A storage counts once, in the first part that keeps it. ``print`` shows a table."""

    @property
    def own(self) -> int:
        """Bytes that the Tuner holds above the model."""
        return sum(held.own for held in self.values())

    @property
    def shared(self) -> int:
        """Bytes of the model that the Tuner reads where they are."""
        return sum(held.shared for held in self.values())

    def __str__(self) -> str:
        rows = [(part, held.own, held.shared, held.why) for part, held in self.items()]
        rows.append(("total", self.own, self.shared, ""))
        lines = [f"{'':18}{'own':>12}{'shared':>12}"]
        for part, own, shared, why in rows:
            lines.append(f"{part:18}{own / 1e6:9.1f} MB{shared / 1e6:9.1f} MB  {why}".rstrip())
        return "\n".join(lines)


def measure(model: nn.Module, parts: dict[str, tuple[str, Any]]) -> Memory:
    """Sizes of ``parts``, each a reason and an object, some of whose storages may be the model's."""
    theirs = {storage for tensor in (*model.parameters(), *model.buffers()) for storage, _ in _storage(tensor)}
    counted: set[int] = set()
    memory = Memory()
    for part, (why, thing) in parts.items():
        sizes = {storage: size for tensor in tensors(thing) for storage, size in _storage(tensor)}
        sizes = {storage: size for storage, size in sizes.items() if storage not in counted}
        counted |= sizes.keys()
        shared = sum(size for storage, size in sizes.items() if storage in theirs)
        memory[part] = Held(sum(sizes.values()) - shared, shared, why)
    return memory


def tensors(thing: Any) -> Iterator[Tensor]:
    """Every tensor that ``thing`` keeps alive through attributes, containers, bound methods and autograd graphs."""
    seen: dict[int, Any] = {}  # the things themselves too: an id is free again when its owner is gone
    waiting = [thing]
    while waiting:
        thing = waiting.pop()
        if id(thing) in seen or isinstance(thing, (str, bytes, int, float, type, ModuleType, FunctionType)):
            continue
        seen[id(thing)] = thing
        if isinstance(thing, Tensor):
            yield thing
            waiting.append(thing.grad_fn)
        elif isinstance(thing, dict):
            waiting += thing.values()
        elif isinstance(thing, (list, tuple, set, frozenset)):
            waiting += thing
        elif isinstance(thing, MethodType):
            waiting.append(thing.__self__)
        elif hasattr(thing, "next_functions"):  # a node of a graph, with what it has saved for its backward pass
            waiting += [node for node, _ in thing.next_functions]
            waiting += [getattr(thing, name) for name in dir(thing) if name.startswith("_saved_") or name == "variable"]
        else:
            waiting += getattr(thing, "__dict__", {}).values()


def _storage(tensor: Tensor) -> Iterator[tuple[int, int]]:
    storage = tensor.untyped_storage()
    if storage.nbytes():
        yield storage.data_ptr(), storage.nbytes()
