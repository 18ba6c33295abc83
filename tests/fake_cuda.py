"""A Tuner on a GPU that is not there.

PyTorch's fake tensors have a device, a type and a shape, but no values: whatever would make the host wait for a value
raises, and so does an op whose tensors lie on different devices. Neither is allowed while a CUDA graph is captured.
"""

import copy
import copyreg
import weakref
from contextlib import ExitStack
from threading import Lock
from types import FunctionType, MethodType, ModuleType
from unittest.mock import patch

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tpt_fast import TextEncoder, Tuner
from tpt_fast.models.family import Family
from tpt_fast.text.tower import TextTower
from tpt_fast.vision import ImageEncoder

DEVICE = torch.device("cuda:0")


def on_cuda(tuner, mode: FakeTensorMode):
    """A copy of a CPU's ``tuner`` whose tensors are fakes on the GPU."""
    memo = {id(tuner.classes.text._lock): Lock()}
    for tensor in tensors(tuner):
        fake = mode.from_tensor(tensor.detach())
        with mode:
            fake = fake.to(DEVICE)
        memo[id(tensor)] = torch.nn.Parameter(fake, False) if isinstance(tensor, torch.nn.Parameter) else fake
    with ExitStack() as stack:  # every attribute as it is: what copies make anew, they could not make here
        for kind in (Tuner, TextEncoder, TextTower, ImageEncoder, Family):
            plain = {"__reduce_ex__": _attributes, "__setstate__": lambda self, state: vars(self).update(state)}
            stack.enter_context(patch.multiple(kind, **plain, create=True))
        twin = copy.deepcopy(tuner, memo)
    for holder in (twin.classes.text, twin.clip.text):
        holder.device = DEVICE
    return twin


def _attributes(thing, protocol):
    return copyreg.__newobj__, (type(thing),), dict(vars(thing))


def tensors(thing):
    """Every tensor that ``thing`` keeps alive through attributes, containers and bound methods."""
    seen = {}  # the things themselves too: an id is free again when its owner is gone
    waiting = [thing]
    while waiting:
        thing = waiting.pop()
        if id(thing) in seen or isinstance(thing, (str, bytes, int, float, type, ModuleType, FunctionType)):
            continue
        seen[id(thing)] = thing
        if isinstance(thing, torch.Tensor):
            yield thing
        elif isinstance(thing, dict):
            waiting += thing.values()
        elif isinstance(thing, (list, tuple, set, frozenset)):
            waiting += thing
        elif isinstance(thing, MethodType):
            waiting.append(thing.__self__)
        else:
            waiting += getattr(thing, "__dict__", {}).values()


class Count(TorchDispatchMode):
    """Counts what is done on the device while this is active."""

    def __init__(self):
        super().__init__()
        self.ops: list[str] = []  #: names of those that are more than a view
        self.peak = 0  #: bytes of the results that were alive together
        self._alive: dict[int, int] = {}  # storage -> bytes

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        results = func(*args, **(kwargs or {}))
        if func.namespace == "prim" or func.is_view:
            return results
        self.ops.append(str(func))
        for result in tree_leaves(results):
            if isinstance(result, torch.Tensor):
                self._count(result.untyped_storage())
        return results

    def _count(self, storage):
        if storage._cdata not in self._alive:
            self._alive[storage._cdata] = storage.nbytes()
            weakref.finalize(storage, self._alive.pop, storage._cdata)
            self.peak = max(self.peak, sum(self._alive.values()))
