"""Movement: ops that only place elements. No algebra is needed: the op itself is run on the ids."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from awqc.rules import Sample, example, rule
from awqc.scaleflow.op import Op
from awqc.scaleflow.scaled import Scaled, Value
from awqc.views import call_on, operand

aten = torch.ops.aten

_ONE_TENSOR = (
    aten.view.default,
    aten.reshape.default,
    aten._unsafe_view.default,
    aten.permute.default,
    aten.transpose.int,
    aten.swapaxes.default,
    aten.t.default,
    aten.numpy_T.default,
    aten.mT.default,
    aten.unsqueeze.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
    aten.squeeze.default,
    aten.expand.default,
    aten.broadcast_to.default,
    aten.slice.Tensor,
    aten.select.int,
    aten.narrow.default,
    aten.flatten.using_ints,
    aten.unflatten.int,
    aten.repeat.default,
    aten.repeat_interleave.self_int,
    aten.flip.default,
    aten.roll.default,
    aten.movedim.int,
    aten.movedim.intlist,
    aten.swapdims.default,
    aten.tile.default,
    aten.unfold.default,
    aten.diagonal.default,
)
_KEEP_VALUES = (
    aten.clone.default,
    aten.contiguous.default,
    aten.alias.default,
    aten.detach.default,
    aten.lift_fresh_copy.default,
)
_SEVERAL = (
    aten.split.Tensor,
    aten.split_with_sizes.default,
    aten.split.sizes,
    aten.chunk.default,
    aten.unsafe_split.Tensor,
    aten.unsafe_chunk.default,
    aten.tensor_split.sections,
    aten.unbind.int,
)


_RESHAPES = (
    aten.view.default,
    aten.reshape.default,
    aten._unsafe_view.default,
    aten.flatten.using_ints,
    aten.unflatten.int,
)


_CASTS = (aten.to.dtype, aten._to_copy.default, aten.to.device, aten.to.dtype_layout)


def replay(node: fx.Node, source: Any) -> Any:
    """What ``node`` makes of ``source`` in place of its first operand; None if it does more than place its
    elements, or is not known to."""
    if node.target is operator.getitem:
        return source[operand(node, 1)]
    if node.target in _CASTS and node.meta["val"].is_floating_point():
        return source
    if node.target in _ONE_TENSOR or node.target in _KEEP_VALUES or node.target in _SEVERAL:
        return call_on(node, source)
    return None


def _ids(*size: int) -> Tensor:
    return torch.arange(torch.Size(size).numel(), dtype=torch.int32).reshape(size)


_X = example(2, 3, 8)
_LAST = {0: torch.arange(8, dtype=torch.int32)}

_CALLS: dict[Any, tuple[Any, ...]] = {
    aten.view.default: ([6, 2, 4],),
    aten.reshape.default: ([2, 24],),
    aten._unsafe_view.default: ([6, 8],),
    aten.permute.default: ([2, 0, 1],),
    aten.transpose.int: (1, 2),
    aten.swapaxes.default: (1, 2),
    aten.unsqueeze.default: (1,),
    aten.squeeze.dim: (0,),
    aten.squeeze.dims: ([0],),
    aten.expand.default: ([5, 2, 3, 8],),
    aten.broadcast_to.default: ([5, 2, 3, 8],),
    aten.slice.Tensor: (2, 2, 6),
    aten.select.int: (1, 1),
    aten.narrow.default: (2, 1, 4),
    aten.flatten.using_ints: (1, 2),
    aten.unflatten.int: (2, [4, 2]),
    aten.repeat.default: ([1, 2, 2],),
    aten.repeat_interleave.self_int: (2, 2),
    aten.flip.default: ([2],),
    aten.roll.default: ([3], [2]),
    aten.movedim.int: (0, 2),
    aten.movedim.intlist: ([0, 1], [2, 0]),
    aten.swapdims.default: (1, 2),
    aten.tile.default: ([1, 1, 2],),
    aten.unfold.default: (2, 3, 2),
    aten.diagonal.default: (0, 0, 1),
}


def _one_tensor(op: Op) -> Value:
    value = op.value(op.args[0])
    if value is None:
        return None
    if op.node.target in _RESHAPES:
        return Scaled(reshaped(value.ids, op.shape), value.degree)
    return Scaled(call_on(op.node, value.ids), value.degree)


def reshaped(ids: Tensor, size: Sequence[int]) -> Tensor:
    """``ids.reshape(size)``, with constant dimensions of ``ids`` (stride 0) kept that way.

    Input and output dimensions are cut into the shortest runs of equal product. Each run is reshaped within
    itself, so one that is constant stays a single element: tokens are not spread out to merge heads.
    """
    if ids.numel() == 0:
        return ids.reshape(list(size))
    core = Scaled(ids).core()
    before, after = list(ids.shape), list(size)
    spread: list[int] = []
    merged: list[int] = []
    while before or after:
        a, b = before[:1], after[:1]
        while math.prod(a) != math.prod(b):
            if math.prod(a) < math.prod(b):
                a = before[: len(a) + 1]
            else:
                b = after[: len(b) + 1]
        before, after = before[len(a) :], after[len(b) :]
        constant = math.prod(core.shape[len(spread) : len(spread) + len(a)]) == 1
        spread += [1] * len(a) if constant else a
        merged += [1] * len(b) if constant else b
    return core.expand(spread).reshape(merged).expand(list(size))


for _op in _ONE_TENSOR:
    _x = _X[0] if _op is aten.t.default else _X
    _samples = [Sample((_x, *_CALLS.get(_op, ())), scale=_LAST)]
    if _op is aten.view.default:
        _samples += [
            Sample((_X, [2, 24]), scale={0: _ids(1, 1, 8)}),
            Sample((_X, [2, 24, 1]), scale={0: _ids(1, 3, 1)}),
            Sample((_X[None, :, None], [6, 1, 4, 2, 1]), scale={0: _ids(1, 2, 1, 1, 1)}),
            Sample((_X, [48]), scale={0: _ids(2, 1, 1)}),
        ]
    rule(_op, samples=_samples)(_one_tensor)


@rule(*_KEEP_VALUES, samples=[Sample((_X,), scale=_LAST), Sample((_X,), scale={0: _ids(2, 1, 8)})])
def keep_values(op: Op) -> Value:
    """Copies and aliases: every element keeps its id."""
    return op.value(op.args[0])


@rule(
    aten.split.Tensor,
    aten.chunk.default,
    aten.unsafe_split.Tensor,
    aten.unsafe_chunk.default,
    aten.tensor_split.sections,
    samples=[Sample((_X, 4, 2), scale=_LAST)],
)
@rule(aten.split_with_sizes.default, aten.split.sizes, samples=[Sample((_X, [3, 5], 2), scale=_LAST)])
@rule(aten.unbind.int, samples=[Sample((_X, 1), scale={0: _ids(1, 3, 8)})])
def several(op: Op) -> Value:
    """Splits: the op is run on the ids, each piece keeps its own."""
    value = op.value(op.args[0])
    if value is None:
        return None
    return [Scaled(piece, value.degree) for piece in call_on(op.node, value.ids)]


@rule(aten.cat.default, samples=[Sample(([_X, _X], 2), scale={0: _ids(1, 1, 8)})])
@rule(aten.stack.default, samples=[Sample(([_X, _X], 1), scale={1: _ids(1, 1, 8)})])
def join_tensors(op: Op) -> Value:
    """Concatenation: unscaled pieces carry -1; pieces of different degree cannot share a result."""
    pieces = [(node, op.value(node)) for node in op.args[0]]
    degrees = {value.degree for _, value in pieces if value is not None}
    if len(degrees) != 1:
        for _, value in pieces:
            op.poison(value, "tensors scaled to different powers are concatenated")
        return None
    ids = [
        value.ids
        if value is not None
        else torch.full((1,), -1, dtype=torch.int32).expand(node.meta["val"].shape)
        for node, value in pieces
    ]
    return Scaled(call_on(op.node, ids), degrees.pop())


@rule(
    aten.expand_as.default,
    aten.view_as.default,
    samples=[Sample((_X, _X), scale=_LAST), Sample((_X, _X), scale={1: _LAST[0]})],
)
def like_another(op: Op) -> Value:
    """The shape of the second operand."""
    op.ignore(op.args[1])
    value = op.value(op.args[0])
    if value is None:
        return None
    if op.node.target is aten.expand_as.default:
        return Scaled(value.ids.expand(op.shape), value.degree)
    return Scaled(reshaped(value.ids, op.shape), value.degree)


@rule(
    aten.pad.default,
    samples=[
        Sample((_X, [0, 0, 1, 2]), scale=_LAST),
        Sample((_X, [2, 1]), scale=_LAST),
        Sample((_X, [0, -3]), scale=_LAST),
        Sample((_X, [2, 1], "constant", 1.5), scale=_LAST),
        Sample((_X, [0, 0, 1, 2], "constant", 1.5), scale=_LAST),
        Sample((_X, [0, 0, 1, 1], "reflect"), scale=_LAST, alive=0),
    ],
)
@rule(aten.constant_pad_nd.default, samples=[Sample((_X, [0, 0, 1, 2]), scale=_LAST)])
def pad(op: Op) -> Value:
    """Zeros are divided by anything, so they take the scale of their dimension; other numbers have none."""
    value, filled = op.value(op.args[0]), op.arg(3, "value")
    if op.node.target is aten.constant_pad_nd.default:
        filled = op.arg(2, "value", 0)
    elif op.arg(2, "mode", "constant") != "constant":
        op.poison(value, f"pads by {op.args[2]!r}")
        return None
    if value is None:
        return None
    ids = value.ids
    sides = op.args[1]
    for dim, before, after in zip(range(ids.ndim - 1, -1, -1), sides[::2], sides[1::2], strict=False):
        if before == after == 0:
            continue
        if not filled and value.constant_along(dim):
            ids = ids.narrow(dim, 0, 1).expand(*ids.shape[:dim], op.shape[dim], *ids.shape[dim + 1 :])
        else:
            ids = F.pad(ids, [0, 0] * (ids.ndim - 1 - dim) + [before, after], value=-1)
    return Scaled(ids, value.degree)
