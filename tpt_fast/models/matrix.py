"""Products with a tower's weights, which stay as they are."""

from __future__ import annotations

import copy
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn

from ..ops._types import accumulation_dtype
from ..ops.bias_act import bias_act_
from ..ops.linear import linear, panels
from ..reference.linear import PANEL, TOGETHER
from . import products

_laid_out: WeakValueDictionary[tuple, Tensor] = WeakValueDictionary()


class Matrix:
    """A frozen ``weight`` [out, in] in any storage type."""

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight
        self.panels: Tensor | None = None  #: the weight as our own product reads it
        self.turned: Tensor | None = None  #: the same of its transpose, for gradients

    def lay_out(self, *, backward: bool = False) -> Matrix:
        """Where our own product is the faster one, a matrix that holds the weight in its layout too, and once more
        transposed if ``backward``, which matrices of one weight share; elsewhere this one."""
        if self.weight.device.type != "cpu" or not products.own_is_faster(self.weight.dtype):
            return self
        made = Matrix(self.weight)
        made.panels = _shared_panels(self.weight)
        made.turned = _shared_panels(self.weight.t()) if backward else None
        return made

    @property
    def laid_out(self) -> bool:
        """Whether our own product runs."""
        return self.panels is not None

    def tensors(self) -> list[Tensor]:
        """What it holds."""
        return [each for each in (self.weight, self.panels, self.turned) if each is not None]

    def project(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """``x @ weight.T + bias`` of x [..., in], bias in the storage type."""
        if self.panels is None:
            return nn.functional.linear(x, self.weight, bias)
        wide = None if bias is None else bias.to(accumulation_dtype(bias.dtype))
        return linear(x, self.panels, wide, width=len(self.weight))

    def activate(self, x: Tensor, bias: Tensor | None, activation: str) -> Tensor:
        """``activation(x @ weight.T + bias)``, bias in the accumulation type."""
        if self.panels is None:
            return bias_act_(self.project(x), bias, activation)
        return linear(x, self.panels, bias, width=len(self.weight), activation=activation)

    def back(self, grad: Tensor) -> Tensor:
        """``grad @ weight`` [..., in] of the gradient [..., out] of what :meth:`project` gives."""
        if self.turned is None:
            return grad @ self.weight
        return linear(grad, self.turned, width=self.weight.shape[1])

    def rows(self, start: int, stop: int) -> Matrix:
        """``weight[start:stop]``, in the memory of this one where it does not cut what lies together."""
        part = copy.copy(self)
        part.weight = self.weight[start:stop]
        panel, together = PANEL.get(self.weight.dtype, 1), TOGETHER.get(self.weight.dtype, 1)

        def cuts(step: int) -> bool:
            """Whether these rows are whole steps of the layout."""
            return start % step == 0 and (stop % step == 0 or stop == len(self.weight))

        if self.panels is not None:
            part.panels = self.panels[start // panel : -(-stop // panel)] if cuts(panel) else panels(part.weight)
        if self.turned is not None:
            within = self.turned[:, start // together : -(-stop // together)]
            part.turned = within if cuts(together) else panels(part.weight.t())
        return part


def _shared_panels(weight: Tensor) -> Tensor:
    """:func:`panels`, cached for each weight as long as a matrix uses them: several Tuners of one model would hold
    several copies. A matrix holds its weight with its panels, so an address cannot mean another weight; that it has not
    been overwritten meanwhile is checked."""
    made, key = panels(weight), (weight.data_ptr(), weight.shape, weight.stride())
    known = _laid_out.get(key)
    if known is not None and torch.equal(known, made):
        return known
    _laid_out[key] = made
    return made
