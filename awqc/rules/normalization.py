"""Normalizations: the weight is where a scale is folded, the bias joins; the normalized input refuses."""

from __future__ import annotations

import torch
from torch import fx

from awqc.op import Op
from awqc.rules import Sample, example, rule
from awqc.rules.elementwise import joins_broadcast
from awqc.scaled import Scaled, Value

aten = torch.ops.aten

_X = example(2, 3, 8)
_W = example(8)
_B = example(8)
_IDS = torch.arange(8, dtype=torch.int32)


@rule(
    aten.layer_norm.default,
    samples=[
        Sample((_X, [8], _W, _B), scale={1: _IDS}, parameters=(1, 2)),
        Sample((_X, [8], _W), scale={1: _IDS}, parameters=(1,)),
        Sample((_X, [8], _W, _B), scale={0: _IDS}, alive=0),
        Sample((_X, [8], _W, _B), scale={2: _IDS}, parameters=(1, 2), alive=0),
    ],
)
@rule(
    aten.rms_norm.default,
    samples=[
        Sample((_X, [8], _W), scale={1: _IDS}, parameters=(1,)),
        Sample((_X, [8], _W), scale={0: _IDS}, alive=0),
    ],
)
def norm(op: Op) -> Value:
    """``n(x) w + b``: dividing ``w`` and ``b`` divides the result."""
    op.poison(op.value(op.args[0]), "a normalization mixes all its channels")
    weight, bias = op.value(op.arg(2, "weight")), None
    if op.node.target is aten.layer_norm.default:
        bias = op.arg(3, "bias")
    if weight is None:
        op.poison(op.value(bias), "the weight of the normalization is not scaled along")
        return None
    ids = weight.ids.expand(op.shape)
    if isinstance(bias, fx.Node) and not joins_broadcast(op, bias, ids, weight.degree):
        op.poison(weight, f"the bias {bias} is not scaled along")
        return None
    return Scaled(ids, weight.degree)
