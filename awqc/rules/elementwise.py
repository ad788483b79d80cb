"""Elementwise ops: products add degrees, homogeneous functions pass."""

from __future__ import annotations

from dataclasses import replace

import torch

from awqc.rules import Sample, example, rule
from awqc.scaleflow.op import Op
from awqc.scaleflow.scaled import Scaled, Value

aten = torch.ops.aten

_X = example(2, 3, 8)
_Y = example(2, 3, 8)
_V = example(8)
_IDS = torch.arange(8, dtype=torch.int32)
_EXPONENTS = {
    aten.square.default: 2,
    aten.sqrt.default: 0.5,
    aten.rsqrt.default: -0.5,
    aten.reciprocal.default: -1,
}
_PAIRS = torch.arange(8, dtype=torch.int32) // 2


@rule(
    aten.relu.default,
    aten.leaky_relu.default,
    aten.neg.default,
    aten.negative.default,
    aten.abs.default,
    aten.tril.default,
    aten.triu.default,
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
    if op.node.target is aten.type_as.default:
        op.ignore(op.args[1])
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


@rule(
    aten.prelu.default,
    samples=[
        Sample((_X[0], _V), scale={0: _IDS}),
        Sample((_X[0], _V), scale={1: _IDS}, alive=0),
    ],
)
def parametric_relu(op: Op) -> Value:
    """``max(x, 0) + w min(x, 0)``: homogeneous in ``x``."""
    op.poison(op.value(op.args[1]), "it weighs the negative values only")
    return op.value(op.args[0])


@rule(
    aten.glu.default,
    samples=[
        Sample((_X, -1), scale={0: torch.where(_IDS < 4, _IDS, -1)}),
        Sample((_X,), scale={0: _IDS}, alive=4),
    ],
)
def gated(op: Op) -> Value:
    """``a * sigmoid(b)`` of the halves of a tensor: linear in ``a``."""
    value = op.value(op.args[0])
    if value is None:
        return None
    through, gate = value.ids.chunk(2, op.arg(1, "dim", -1))
    op.poison(Scaled(gate), "its second half goes through a sigmoid")
    return Scaled(through, value.degree)


@rule(aten.sqrt.default, samples=[Sample((_X.abs(),), scale={0: _IDS})])
@rule(aten.rsqrt.default, samples=[Sample((_X.abs(),), scale={0: _IDS})])
@rule(aten.reciprocal.default, samples=[Sample((_X,), scale={0: _IDS})])
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
    exponent = _EXPONENTS[op.node.target] if op.node.target in _EXPONENTS else op.arg(1)
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
@rule(aten.multiply.Tensor, samples=[Sample((_X, _Y), scale={0: _IDS, 1: _IDS})])
@rule(aten.mul.Scalar, samples=[Sample((_X, 3.0), scale={0: _IDS})])
@rule(
    aten.div.Tensor,
    samples=[
        Sample((_X, _Y), scale={0: _IDS}),
        Sample((_X, 2.0), scale={0: _IDS}),
        Sample((_X, _Y), scale={1: _IDS}),
    ],
)
@rule(aten.divide.Tensor, samples=[Sample((_X, _Y), scale={1: _IDS})])
@rule(aten.div.Scalar, samples=[Sample((_X, 3.0), scale={0: _IDS})])
def product(op: Op) -> Value:
    """A product of scaled tensors with equal ids adds their degrees, a quotient subtracts them.

    Where no ids are equal, as in the two halves of a gated unit, one factor alone can carry the scale.
    """
    left, right = op.value(op.args[0]), op.value(op.args[1])
    if right is not None and op.node.target in (aten.div.Tensor, aten.divide.Tensor):
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
