"""Elementwise ops: products add degrees, sums need equal ids, homogeneous functions pass."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from awqc.op import Op
from awqc.rules import Sample, example, rule
from awqc.scaled import Scaled, Value

aten = torch.ops.aten

_X = example(2, 3, 8)
_Y = example(2, 3, 8)
_V = example(8)
_IDS = torch.arange(8, dtype=torch.int32)
_PAIRS = torch.arange(8, dtype=torch.int32) // 2


@rule(
    aten.relu.default,
    aten.leaky_relu.default,
    aten.neg.default,
    aten.abs.default,
    samples=[Sample((_X,), scale={0: _IDS}), Sample((_X,), scale={0: _PAIRS})],
)
@rule(aten.dropout.default, samples=[Sample((_X, 0.5, False), scale={0: _IDS})])
@rule(aten.to.dtype, samples=[Sample((_X, torch.float64), scale={0: _IDS})])
@rule(aten._to_copy.default, samples=[Sample((_X,), scale={0: _IDS}, kwargs={"dtype": torch.float64})])
@rule(aten.to.device, samples=[Sample((_X, "cpu", torch.float64), scale={0: _IDS})])
@rule(aten.to.dtype_layout, samples=[Sample((_X,), scale={0: _IDS}, kwargs={"dtype": torch.float64})])
@rule(
    aten.type_as.default,
    samples=[
        Sample((_X, _Y), scale={0: _IDS}),
        Sample((_X, _Y), scale={0: _IDS, 1: _IDS.flip(0)}),
        Sample((_X, _Y), scale={1: _IDS}),
    ],
)
def homogeneous(op: Op) -> Value:
    """``f(x / s) = f(x) / s`` for every positive ``s``."""
    if op.node.target is aten.dropout.default and op.arg(2):
        op.poison(op.value(op.args[0]), "dropout is active")
        return None
    if not op.node.meta["val"].dtype.is_floating_point:
        op.poison(op.value(op.args[0]), "it is rounded to integers")
        return None
    return op.value(op.args[0])


@rule(
    aten.clamp_min.default,
    samples=[Sample((_X, 0.0), scale={0: _IDS}), Sample((_X, 0.5), scale={0: _IDS}, alive=0)],
)
@rule(
    aten.clamp.default,
    samples=[Sample((_X, 0.0), scale={0: _IDS}), Sample((_X, 0.0, 1.0), scale={0: _IDS}, alive=0)],
)
def clamp(op: Op) -> Value:
    """A bound at zero is homogeneous; any other is not."""
    value, low, high = op.value(op.args[0]), op.arg(1, "min"), op.arg(2, "max")
    if low in (None, 0, 0.0) and high in (None, 0, 0.0):
        return value
    op.poison(value, f"clamps to [{low}, {high}]")
    return None


@rule(
    aten.threshold.default,
    samples=[Sample((_X, 0, 0), scale={0: _IDS}), Sample((_X, 1, 0), scale={0: _IDS}, alive=0)],
)
def threshold(op: Op) -> Value:
    """``relu`` when both the threshold and the replacement are zero."""
    value = op.value(op.args[0])
    if op.args[1] == 0 and op.args[2] == 0:
        return value
    op.poison(value, "compares with a threshold that is not zero")
    return None


@rule(aten.square.default, samples=[Sample((_X,), scale={0: _IDS})])
@rule(
    aten.pow.Tensor_Scalar,
    samples=[
        Sample((_X, 2), scale={0: _IDS}),
        Sample((_X, 3), scale={0: _PAIRS}),
        Sample((_X.abs(), 0.5), scale={0: _IDS}),
    ],
)
def power(op: Op) -> Value:
    """``(x / s) ** p = x ** p / s ** p``: the degree is multiplied."""
    value = op.value(op.args[0])
    exponent = op.arg(1) if op.node.target is aten.pow.Tensor_Scalar else 2
    if value is None or exponent == 0:
        return None
    return Scaled(value.ids, value.degree * float(exponent))


@rule(
    aten.mul.Tensor,
    samples=[
        Sample((_X, _Y), scale={0: _IDS}),
        Sample((_X, _V), scale={1: _IDS}),
        Sample((_X, _Y), scale={0: _IDS, 1: _IDS}),
        Sample((_X, 3.0), scale={0: _IDS}),
        Sample((_X, _Y), scale={0: _IDS, 1: _IDS + 8}, alive=8),
        Sample((_X, _Y), scale={0: _IDS, 1: torch.where(_IDS < 4, _IDS, _IDS + 4)}, alive=4),
        Sample((_X, _Y), scale={0: _IDS, 1: _IDS.flip(0)}, alive=0),
    ],
)
@rule(aten.mul.Scalar, samples=[Sample((_X, 3.0), scale={0: _IDS})])
@rule(
    aten.div.Tensor,
    samples=[
        Sample((_X, _Y), scale={0: _IDS}),
        Sample((_X, 2.0), scale={0: _IDS}),
        Sample((_X, _Y), scale={1: _IDS}),
    ],
)
@rule(aten.div.Scalar, samples=[Sample((_X, 3.0), scale={0: _IDS})])
def product(op: Op) -> Value:
    """A product of scaled tensors with equal ids adds their degrees, a quotient subtracts them.

    Where no ids are equal, as in the two halves of a gated unit, one factor alone can carry the scale.
    """
    left, right = op.value(op.args[0]), op.value(op.args[1])
    if right is not None and op.node.target is aten.div.Tensor:
        right = replace(right, degree=-right.degree)
    return multiplied(op, left, right)


def multiplied(op: Op, left: Scaled | None, right: Scaled | None) -> Scaled | None:
    """The product of two tensors that broadcast to the result of ``op``."""
    if left is None or right is None:
        one = left if right is None else right
        return None if one is None else Scaled(one.ids.expand(op.shape), one.degree)
    a, b = left.ids.expand(op.shape), right.ids.expand(op.shape)
    core_a, core_b = torch.broadcast_tensors(Scaled(a).core(), Scaled(b).core())
    unequal = core_a != core_b
    if bool(unequal.all()):
        op.poison(right, "another factor is scaled already")
        return Scaled(a, left.degree)
    if bool(unequal.any()):
        for ids in (core_a, core_b):
            op.poison(Scaled(ids), "channels scaled by different factors are multiplied", unequal)
    degree = left.degree + right.degree
    return Scaled(torch.where(unequal, -1, core_a).expand(op.shape), degree) if degree else None


@rule(
    aten.add.Tensor,
    aten.sub.Tensor,
    samples=[
        Sample((_X, _Y), scale={0: _IDS, 1: _IDS}),
        Sample((_X, _V), scale={0: _IDS}, parameters=(1,)),
        Sample((_V, _X), scale={1: _IDS}, parameters=(0,)),
        Sample((_X, _Y), scale={0: _IDS}, alive=0),
        Sample((_X, _Y), scale={0: _IDS, 1: _IDS.flip(0)}, alive=0),
        Sample((_X, _V[:1]), scale={0: _IDS}, parameters=(1,), alive=0),
        Sample((_X, 0.0), scale={0: _IDS}),
        Sample((_X, 1.0), scale={0: _IDS}, alive=0),
    ],
)
@rule(aten.add.Scalar, aten.sub.Scalar, samples=[Sample((_X, 1.0), scale={0: _IDS}, alive=0)])
def add(op: Op) -> Value:
    """Both terms must be divided alike: two scaled tensors, or a scaled one and a parameter that joins."""
    left, right = op.value(op.args[0]), op.value(op.args[1])
    if left is not None and right is not None:
        return _agree(op, left, right)
    value, other = (left, op.args[1]) if left is not None else (right, op.args[0])
    if value is None:
        return None
    if isinstance(other, (int, float)):
        if other == 0:
            return value
        op.poison(value, f"the constant {other} is added")
        return None
    ids = value.ids.expand(op.shape)
    if not joins_broadcast(op, other, ids, value.degree):
        op.poison(value, f"is added to {other}, which is not scaled along")
        return None
    return Scaled(ids, value.degree)


def _agree(op: Op, left: Scaled, right: Scaled) -> Value:
    a, b = Scaled(left.ids.expand(op.shape)).core(), Scaled(right.ids.expand(op.shape)).core()
    a, b = torch.broadcast_tensors(a, b)
    unequal = a != b if left.degree == right.degree else (a >= 0) | (b >= 0)
    if bool(unequal.any()):
        for ids in (a, b):
            op.poison(Scaled(ids), "channels scaled by different factors are added", unequal)
    return Scaled(torch.where(unequal, -1, a).expand(op.shape), left.degree)


def joins_broadcast(op: Op, parameter: object, ids: Tensor, degree: float) -> bool:
    """Let ``parameter``, which broadcasts to ``ids``, be divided by the same channels.

    False if it is no parameter, or if one of its elements would need several channels.
    """
    if not isinstance(parameter, torch.fx.Node):
        return False
    size = tuple(parameter.meta["val"].shape)
    value = Scaled(ids, degree)
    for dim in range(ids.ndim - len(size)):
        if not value.constant_along(dim):
            return False
    for dim in range(1, len(size) + 1):
        if size[-dim] == 1 and ids.shape[-dim] > 1 and not value.constant_along(ids.ndim - dim):
            return False
    for _ in range(ids.ndim - len(size)):
        ids = ids[0]
    for dim, length in enumerate(size):
        if length == 1:
            ids = ids.narrow(dim, 0, 1)
    return op.join(parameter, ids, degree)


@rule(
    aten.masked_fill.Scalar,
    samples=[
        Sample((_X, _Y > 0, 0.0), scale={0: _IDS}),
        Sample((_X, _Y > 0, -1.0), scale={0: _IDS}, alive=0),
    ],
)
def masked_fill(op: Op) -> Value:
    """Filling with zero keeps every scale."""
    value = op.value(op.args[0])
    if op.args[2] == 0:
        return value if value is None else Scaled(value.ids.expand(op.shape), value.degree)
    op.poison(value, f"masked positions are filled with {op.args[2]}")
    return None
