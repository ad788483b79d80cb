"""Comparisons that no positive scale changes: with zero, or of two tensors that are divided alike."""

from __future__ import annotations

import torch

from awqc.rules import Sample, example, rule
from awqc.rules.creation import is_zero
from awqc.rules.sums import agreed
from awqc.scaleflow.op import Op
from awqc.scaleflow.scaled import Value

aten = torch.ops.aten

_X = example(2, 3, 8)
_Y = example(2, 3, 8)
_IDS = torch.arange(8, dtype=torch.int32)


@rule(
    aten.sign.default,
    aten.sgn.default,
    aten.isnan.default,
    aten.isinf.default,
    aten.isfinite.default,
    aten.logical_not.default,
    samples=[Sample((_X,), scale={0: _IDS})],
)
def of_sign(op: Op) -> Value:
    """Depends on the sign alone, or on whether there is a finite number at all."""
    op.ignore(op.args[0])
    return None


@rule(
    aten.gt.Scalar,
    aten.ge.Scalar,
    aten.lt.Scalar,
    aten.le.Scalar,
    aten.eq.Scalar,
    aten.ne.Scalar,
    samples=[Sample((_X, 0.0), scale={0: _IDS}), Sample((_X, 0.5), scale={0: _IDS}, alive=0)],
)
@rule(
    aten.gt.Tensor,
    aten.ge.Tensor,
    aten.lt.Tensor,
    aten.le.Tensor,
    samples=[
        Sample((_X, _Y), scale={0: _IDS, 1: _IDS}),
        Sample((_X, _Y), scale={0: _IDS}, alive=0),
        Sample((_X, _Y), scale={0: _IDS, 1: _IDS.flip(0)}, alive=0),
    ],
)
def compare(op: Op) -> Value:
    """The result is a truth value, which nothing divides."""
    (first, second) = op.args
    left, right = op.value(first), op.value(second)
    if left is not None and right is not None:
        agreed(op, left, right)
        return None
    value, other = (left, second) if left is not None else (right, first)
    if (isinstance(other, (int, float)) and other == 0) or is_zero(other):
        return None
    op.poison(value, f"is compared with {other}, which is not scaled along")
    return None
