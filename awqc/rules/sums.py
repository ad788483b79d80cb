"""Sums and choices between tensors: both must be divided alike, or one is a parameter that joins."""

from __future__ import annotations

import torch
from torch import Tensor, fx

from awqc.rules import Sample, example, rule
from awqc.rules.creation import is_zero
from awqc.rules.elementwise import multiplied
from awqc.scaleflow.op import Op
from awqc.scaleflow.scaled import Scaled, Value

aten = torch.ops.aten

_X = example(2, 3, 8)
_Y = example(2, 3, 8)
_V = example(8)
_IDS = torch.arange(8, dtype=torch.int32)
_MASK = _X > 0


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
@rule(
    aten.add.Scalar,
    aten.sub.Scalar,
    aten.rsub.Scalar,
    samples=[Sample((_X, 1.0), scale={0: _IDS}, alive=0), Sample((_X, 0.0), scale={0: _IDS})],
)
@rule(
    aten.maximum.default,
    aten.minimum.default,
    samples=[
        Sample((_X, _Y), scale={0: _IDS, 1: _IDS}),
        Sample((_X, _V), scale={0: _IDS}, parameters=(1,)),
        Sample((_X, _Y), scale={0: _IDS}, alive=0),
    ],
)
def add(op: Op) -> Value:
    """Both terms must be divided alike: two scaled tensors, or a scaled one and a parameter that joins."""
    return alike(op, op.args[0], op.args[1])


def alike(op: Op, first: object, second: object) -> Scaled | None:
    """The value of a combination of two operands that scales if both do."""
    left, right = op.value(first), op.value(second)
    if left is not None and right is not None:
        return agreed(op, left, right)
    value, other = (left, second) if left is not None else (right, first)
    if value is None:
        return None
    if isinstance(other, (int, float)) and other != 0:
        op.poison(value, f"the constant {other} is added")
        return None
    ids = value.ids.expand(op.shape)
    zero = isinstance(other, (int, float)) or is_zero(other)
    if not zero and not joins_broadcast(op, other, ids, value.degree, computed=True):
        op.poison(value, f"is added to {other}, which is not scaled along")
        return None
    return Scaled(ids, value.degree)


def agreed(op: Op, left: Scaled, right: Scaled) -> Scaled | None:
    """The value that two tensors which broadcast to the result of ``op`` share."""
    a, b = Scaled(left.ids.expand(op.shape)).core(), Scaled(right.ids.expand(op.shape)).core()
    a, b = torch.broadcast_tensors(a, b)
    unequal = a != b if left.degree == right.degree else (a >= 0) | (b >= 0)
    if bool(unequal.any()):
        for ids in (a, b):
            op.poison(Scaled(ids), "channels scaled by different factors are added", unequal)
    return Scaled(torch.where(unequal, -1, a).expand(op.shape), left.degree)


def joins_broadcast(op: Op, parameter: object, ids: Tensor, degree: float, computed: bool = False) -> bool:
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
    return op.join(parameter, ids, degree, computed)


_WHERE = [
    Sample((_MASK, _X, _Y), scale={1: _IDS, 2: _IDS}),
    Sample((_MASK, _X, _Y), scale={1: _IDS}, alive=0),
    Sample((_MASK, _X, _V), scale={1: _IDS}, parameters=(2,)),
]


@rule(aten.where.self, samples=_WHERE)
@rule(aten.where.ScalarOther, samples=[Sample((_MASK, _X, 0), scale={1: _IDS})])
@rule(aten.where.ScalarSelf, samples=[Sample((_MASK, 2.0, _X), scale={1: _IDS}, alive=0)])
def where(op: Op) -> Value:
    """A choice between two tensors by a mask that no scale changes."""
    op.poison(op.value(op.args[0]), "it decides what is chosen")
    return alike(op, op.args[1], op.args[2])


@rule(
    aten.masked_fill.Scalar,
    samples=[
        Sample((_X, _MASK, 0.0), scale={0: _IDS}),
        Sample((_X, _MASK, -1.0), scale={0: _IDS}, alive=0),
    ],
)
@rule(
    aten.masked_fill.Tensor,
    samples=[Sample((_X, _MASK, example(1)[0]), scale={0: _IDS}, alive=0)],
)
def masked_fill(op: Op) -> Value:
    """Filling with zero keeps every scale."""
    value, filled = op.value(op.args[0]), op.args[2]
    op.poison(op.value(filled), "it fills masked positions")
    if (filled == 0 and not isinstance(filled, fx.Node)) or is_zero(filled):
        return value if value is None else Scaled(value.ids.expand(op.shape), value.degree)
    op.poison(value, f"masked positions are filled with {filled}")
    return None


@rule(
    aten.lerp.Scalar,
    samples=[
        Sample((_X, _Y, 0.3), scale={0: _IDS, 1: _IDS}),
        Sample((_X, _Y, 0.3), scale={0: _IDS}, alive=0),
    ],
)
@rule(
    aten.lerp.Tensor,
    samples=[
        Sample((_X, _Y, _V), scale={0: _IDS, 1: _IDS}),
        Sample((_X, _Y, _V), scale={2: _IDS}, alive=0),
    ],
)
def interpolate(op: Op) -> Value:
    """``x + w (y - x)``."""
    op.poison(op.value(op.args[2]), "it weighs what is interpolated")
    return alike(op, op.args[0], op.args[1])


@rule(
    aten.addcmul.default,
    samples=[
        Sample((_X, _Y, _Y), scale={0: _IDS, 1: _IDS}),
        Sample((_X, _Y, _V), scale={0: _IDS, 2: _IDS}, kwargs={"value": 2.0}),
        Sample((_X, _Y, _Y), scale={0: _IDS, 1: _IDS, 2: _IDS}, alive=0),
        Sample((_X, _Y, _Y), scale={0: _IDS}, alive=0),
    ],
)
def add_product(op: Op) -> Value:
    """``x + a b``."""
    value = op.value(op.args[0])
    product = multiplied(op, op.value(op.args[1]), op.value(op.args[2]))
    if value is not None and product is not None:
        return agreed(op, value, product)
    op.poison(value, "a product that is not scaled along is added")
    op.poison(product, f"is added to {op.args[0]}, which is not scaled along")
    return None
