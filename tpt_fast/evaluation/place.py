"""Which of several processes this is, and what they have to agree on before they begin."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch


class Place(NamedTuple):
    """Of how many processes this is which; images are shared out by stride."""

    rank: int = 0
    processes: int = 1

    @classmethod
    def here(cls) -> Place:
        """As torch.distributed has it, where a process group was made; else one process."""
        group = torch.distributed
        if not group.is_available() or not group.is_initialized():
            return cls()
        return cls(group.get_rank(), group.get_world_size())

    def agreed(self, value: Any) -> Any:
        """The first process's, in each: all must ask."""
        if self.processes == 1:
            return value
        values = [value]
        torch.distributed.broadcast_object_list(values)
        return values[0]
