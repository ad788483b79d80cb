"""Normalizations: the weight is where a scale is folded, the bias joins; the normalized input refuses."""

from __future__ import annotations

import torch
from torch import fx

from awqc.rules import Sample, example, rule
from awqc.rules.sums import joins_broadcast
from awqc.scaleflow.op import Op
from awqc.scaleflow.scaled import Scaled, Value

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


_IMAGE = example(2, 8, 3, 3)


@rule(
    aten.group_norm.default,
    samples=[
        Sample((_IMAGE, 2, _W, _B), scale={1: _IDS}, parameters=(1, 2)),
        Sample((_IMAGE, 2, _W, _B), scale={1: _IDS}, parameters=(1,), alive=0),
        Sample((_IMAGE, 2, _W, _B), scale={0: _IDS[:, None, None]}, alive=0),
        Sample((_IMAGE, 2, _W, _B), scale={2: _IDS}, parameters=(1, 2), alive=0),
    ],
)
@rule(
    aten.batch_norm.default,
    samples=[
        Sample((_IMAGE, _W, _B, _X[0, 0], _X[0, 1].abs(), False, 0.1, 1e-5, False), scale={1: _IDS}, alive=0),
        Sample(
            (_IMAGE, _W, _B, _X[0, 0], _X[0, 1].abs(), False, 0.1, 1e-5, False),
            scale={1: _IDS},
            parameters=(1, 2),
        ),
        Sample(
            (_IMAGE, _W, _B, _X[0, 0], _X[0, 1].abs(), False, 0.1, 1e-5, False),
            scale={0: _IDS[:, None, None]},
            alive=0,
        ),
    ],
)
def norm_of_channels(op: Op) -> Value:
    """``n(x) w + b`` with a weight for each channel, the second dimension."""
    op.poison(op.value(op.args[0]), "a normalization mixes or shifts its channels")
    first = 1 if op.node.target is aten.batch_norm.default else 2
    weight, bias = op.value(op.arg(first, "weight")), op.arg(first + 1, "bias")
    for statistic in op.args[3:5] if first == 1 else ():
        op.poison(op.value(statistic), "it is a statistic of the normalization")
    if weight is None:
        op.poison(op.value(bias), "the weight of the normalization is not scaled along")
        return None
    if isinstance(bias, fx.Node) and not op.join(bias, weight.ids, weight.degree):
        op.poison(weight, f"the bias {bias} is not scaled along")
        return None
    ids = weight.ids.reshape(-1, *[1] * (len(op.shape) - 2))
    return Scaled(ids.expand(op.shape), weight.degree)
