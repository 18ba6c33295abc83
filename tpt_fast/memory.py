"""What a Tuner holds in memory, and why: each of its parts names its tensors, and storages are counted once."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from torch import Tensor, nn

from ._autograd import graph_nodes


@dataclass(frozen=True)
class Size:
    """Bytes of one part."""

    own: int  #: allocated for the Tuner
    shared: int  #: the model's own storages
    why: str


class Memory(dict[str, Size]):
    """Part -> :class:`Size`. A storage counts once, in the first part that keeps it. ``print`` shows a table."""

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


def measure(model: nn.Module, parts: dict[str, tuple[str, Iterable[Tensor]]]) -> Memory:
    """Sizes of ``parts``, each a reason and its tensors, some of whose storages may be the model's."""
    theirs = {storage for tensor in (*model.parameters(), *model.buffers()) for storage, _ in _storage(tensor)}
    counted: set[int] = set()
    memory = Memory()
    for part, (why, tensors) in parts.items():
        sizes = {storage: size for tensor in tensors for storage, size in _storage(tensor)}
        sizes = {storage: size for storage, size in sizes.items() if storage not in counted}
        counted |= sizes.keys()
        shared = sum(size for storage, size in sizes.items() if storage in theirs)
        memory[part] = Size(sum(sizes.values()) - shared, shared, why)
    return memory


def graph_tensors(results: Iterable[Tensor]) -> Iterator[Tensor]:
    """``results`` and every tensor that their autograd graphs have saved for a backward pass."""
    results = list(results)
    yield from results
    for node in graph_nodes(results):
        saved = [getattr(node, name) for name in dir(node) if name.startswith("_saved_") or name == "variable"]
        yield from (each for each in saved if isinstance(each, Tensor))


def _storage(tensor: Tensor) -> Iterator[tuple[int, int]]:
    storage = tensor.untyped_storage()
    if storage.nbytes():
        yield storage.data_ptr(), storage.nbytes()
