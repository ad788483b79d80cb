"""The abstract value of scale flow: what divides each element of a tensor."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from awqc.scaleflow.routing import Routing


@dataclass(frozen=True)
class Scaled:
    """An abstract tensor.

    Args:
        ids: integer tensor of the concrete tensor's shape; dimensions along which nothing changes have
            stride 0, so it stays small. -1 where the element is not scaled.
        degree: the power of the scale that divides the element.
        routing: where ids are families, which expert serves each element; see :mod:`awqc.scaleflow.routing`.
    """

    ids: Tensor
    degree: float = 1.0
    routing: Routing | None = None

    def core(self) -> Tensor:
        """The ids with every constant dimension reduced to size 1."""
        return unexpanded(self.ids)

    def compacted(self) -> Scaled:
        """The same in as little memory as it takes."""
        routing = self.routing
        if routing is not None:
            routing = replace(routing, rows=compact(routing.rows))
        return Scaled(compact(self.ids), self.degree, routing)

    def transposed(self) -> Scaled:
        """What it says of the tensor with its last two dimensions swapped."""
        routing = self.routing
        if routing is not None:
            routing = replace(routing, rows=routing.rows.mT)
        return Scaled(self.ids.mT, self.degree, routing)

    def used(self) -> Tensor:
        """The distinct ids."""
        core = self.core()
        if core.numel() == 0:
            return torch.empty(0, dtype=torch.long)
        there = torch.zeros(int(core.max()) + 2, dtype=torch.bool)
        there[core.flatten()] = True  # -1 sets the last element
        return there[:-1].nonzero().flatten()

    def constant_along(self, dim: int) -> bool:
        """Whether all elements along ``dim`` have the same id."""
        ids = self.ids
        if ids.shape[dim] <= 1 or ids.stride(dim) == 0:
            return True
        core = self.core()
        return bool((core == core.narrow(dim, 0, 1)).all())

    def same(self, other: Scaled | None) -> bool:
        """Whether ``other`` says the same of a tensor of the same shape."""
        if other is None or self.degree != other.degree or self.ids.shape != other.ids.shape:
            return False
        if not torch.equal(*torch.broadcast_tensors(self.core(), other.core())):
            return False
        mine, others = self.routing, other.routing
        if mine is None or others is None:
            return mine is others
        return mine.key is others.key and torch.equal(mine.rows, others.rows)

    def merged(self, other: object) -> Scaled | None:
        """What both say of one tensor, each where the other says nothing; None if they disagree."""
        if not isinstance(other, Scaled):
            return self
        a, b = self.ids, other.ids
        if self.degree != other.degree or bool(((a >= 0) & (b >= 0) & (a != b)).any()):
            return None
        return Scaled(compact(torch.where(a >= 0, a, b)), self.degree)


def unexpanded(ids: Tensor) -> Tensor:
    """``ids`` with every dimension of stride 0 reduced to size 1."""
    for dim, stride in enumerate(ids.stride()):
        if stride == 0 and ids.shape[dim] > 1:
            ids = ids.narrow(dim, 0, 1)
    return ids


def compact(ids: Tensor) -> Tensor:
    """The same ids with stride 0 along every dimension in which they do not change."""
    core = unexpanded(ids)
    for dim, size in enumerate(core.shape):
        if size > 1:
            first = core.narrow(dim, 0, 1)
            if bool((core == first).all()):
                core = first
    return core.expand(ids.shape)


Value = Scaled | list["Scaled | None"] | None
