"""Rows served by experts that are chosen at run time: what divides them is known up to the expert.

Between the linears of experts, element ``(s, n)`` of an activation is divided by the channel ``n`` of
whichever expert serves row ``s``. Such channels form a *family*, one channel for each expert, and the
abstract value holds the id of the family in place of that of a channel. Which expert it is, a tensor of the
graph says: the routing's key. Where rows move, their numbers move with them; only where the row is still
known can another parameter of the same expert undo the scale.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, fx

from awqc.views import operand, shape

aten = torch.ops.aten

_CASTS = (aten.to.dtype, aten._to_copy.default)
_RESHAPES = (aten.view.default, aten.reshape.default, aten.flatten.using_ints)


@dataclass(frozen=True)
class Routing:
    """Which expert serves each element of a tensor.

    Args:
        key: the expert of each row, of any shape, or if ``offsets`` the first row after those of each expert.
        rows: for each element, its row in the flattened key; integer tensor of the tensor's shape.
        offsets: what ``key`` holds.
    """

    key: fx.Node
    rows: Tensor
    offsets: bool

    @classmethod
    def of_rows(cls, key: fx.Node, size: Sequence[int], offsets: bool = False) -> Routing:
        """Elements of a tensor of shape ``size`` whose first dimensions are the rows, in their order."""
        count = 1 if offsets else len(shape(key))
        first = torch.arange(math.prod(size[:count])).reshape(*size[:count], *[1] * (len(size) - count))
        return cls(key, first.expand(size), offsets)

    def in_place(self) -> bool:
        """Whether the first dimensions are the rows, in their order."""
        others = Routing.of_rows(self.key, self.rows.shape, self.offsets)
        return torch.equal(self.rows, others.rows)

    def served_by(self, key: Tensor) -> Tensor:
        """The expert that serves each element, shape of ``rows``, given the value of ``key``."""
        rows = self.rows.to(key.device).long()
        if not self.offsets:
            return key.flatten()[rows]
        # Rows after the last expert's come out as zeros, whatever divides them.
        return torch.searchsorted(key.contiguous(), rows.contiguous(), right=True).clamp(max=len(key) - 1)


@dataclass
class Families:
    """Ids of families of channels, above those of the channels.

    The family of channel ``c`` of the first expert holds ``c + stride * e`` for each expert ``e``.

    Args:
        channels: number of channels; families start there.
    """

    channels: int
    _spacing: dict[fx.Node, tuple[int, int, int]] = field(default_factory=dict)

    def enter(self, key: fx.Node, table: Tensor) -> Tensor | None:
        """Ids ``(M,)`` for columns of ``table`` ``(E, M)``, the channel of each expert: a family where
        experts differ, the channel where they do not. None if the channels are not evenly spaced."""
        first, count = table[0], table.shape[0]
        differ = (table != first).any(0)
        if not bool(differ.any()):
            return first
        column = int(differ.nonzero()[0])
        stride = int(table[1, column] - table[0, column])
        steps = torch.arange(count, dtype=table.dtype)[:, None] * stride
        if bool((first[differ] < 0).any()) or not torch.equal(table[:, differ], first[differ] + steps):
            return None
        base, *spacing = self._spacing.setdefault(
            key, (self.channels * (1 + len(self._spacing)), stride, count)
        )
        return torch.where(differ, first + base, first) if spacing == [stride, count] else None

    @property
    def largest(self) -> int:
        """Channels in the largest family."""
        return max((count for _, _, count in self._spacing.values()), default=0)

    def hold(self, ids: Tensor) -> bool:
        """Whether some of ``ids`` are families."""
        return bool((ids >= self.channels).any())

    def table(self, ids: Tensor, count: int) -> Tensor:
        """Channels ``(count, *ids.shape)`` that ``ids`` stand for at each of ``count`` experts."""
        experts = torch.arange(count).reshape(-1, *[1] * ids.ndim)
        return self.channel(ids.expand(count, *ids.shape), experts)

    def channel(self, ids: Tensor, experts: Tensor) -> Tensor:
        """The channel that each of ``ids`` is at the expert beside it (broadcastable)."""
        found = ids
        for base, stride, _ in self._spacing.values():
            inside = (ids >= base) & (ids < base + self.channels)
            found = torch.where(inside, ids - base + stride * experts.to(ids.dtype), found)
        return found

    def members(self, ids: Tensor) -> Tensor:
        """All channels that the one-dimensional ``ids`` stand for; -1 is left out."""
        found = [ids[(ids >= 0) & (ids < self.channels)]]
        for base, stride, count in self._spacing.values():
            inside = ids[(ids >= base) & (ids < base + self.channels)] - base
            found.append((inside + stride * torch.arange(count, dtype=ids.dtype)[:, None]).flatten())
        return torch.cat(found).long()


def routing_key(offsets: fx.Node, count: int) -> tuple[fx.Node, bool]:
    """What says which of ``count`` experts serves each row of a grouped product: (key, whether it holds
    offsets).

    If ``offsets`` counts the sorted numbers of experts, it is those numbers, so that whoever picks by them
    (a bias) is known to pick the same expert.
    """
    total = _uncast(offsets)
    if total.target is not aten.cumsum.default or count < 2:
        return offsets, True
    counts = _uncast(operand(total, 0))
    bins = [operand(counts, i, name) for i, name in ((1, "bins"), (2, "min"), (3, "max"))]
    if counts.target is not aten.histc.default or bins != [count, 0, count - 1]:
        return offsets, True
    numbers = _uncast(operand(counts, 0))
    order = operand(numbers, 0)
    if not _is_output(numbers, 0, aten.sort.default) or operand(order, 2, "descending", False):
        return offsets, True
    chosen = operand(order, 0)
    while chosen.target in (*_CASTS, *_RESHAPES):
        chosen = operand(chosen, 0)
    if not _is_output(chosen, 1, aten.topk.default):
        return offsets, True
    best = operand(chosen, 0)
    dim, size = operand(best, 2, "dim", -1), shape(operand(best, 0))
    return (numbers, False) if size[dim] == count else (offsets, True)


def _uncast(node: fx.Node) -> fx.Node:
    while node.target in _CASTS:
        node = operand(node, 0)
    return node


def _is_output(node: fx.Node, index: int, target: object) -> bool:
    """Whether ``node`` is output ``index`` of a call of ``target``."""
    source = operand(node, 0)
    return isinstance(source, fx.Node) and source.target is target and operand(node, 1) == index
