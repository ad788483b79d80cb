"""Contractions: linears, matrix products and attention. Here scales are undone: consumers join."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from awqc.rules import Sample, example, rule
from awqc.rules.sums import joins_broadcast
from awqc.scaleflow.op import Op
from awqc.scaleflow.scaled import Scaled, Value

aten = torch.ops.aten

_X = example(2, 3, 8)
_W = example(6, 8)
_B = example(6)
_K = torch.arange(8, dtype=torch.int32)
_N = torch.arange(6, dtype=torch.int32)
_MIXED = "the channels that are summed carry different scales"


@rule(
    aten.linear.default,
    samples=[
        Sample((_X, _W, _B), scale={0: _K}, parameters=(1, 2)),
        Sample((_X, _W), scale={1: _N[:, None]}, parameters=(1,)),
        Sample((_X, _W, _B), scale={1: _N[:, None]}, parameters=(1, 2)),
        Sample((_X, _W), scale={0: _K}, alive=0),
        Sample((_X, _W), scale={1: _K}, alive=0),
        Sample((_X, _W, _B), scale={1: _N[:, None]}, parameters=(1,), alive=0),
        Sample((_X, _W), scale={0: torch.where(_K < 4, _K, -1)}, parameters=(1,), alive=4),
    ],
)
def linear(op: Op) -> Value:
    """``y = x W^T + b``: scaled rows of ``W`` scale ``y`` (``b`` joins); a scaled ``x`` is undone in the
    columns of ``W``, which joins with the opposite degree."""
    x, weight, bias = op.args[0], op.args[1], op.arg(2, "bias")
    value, rows = op.value(x), op.value(weight)
    if value is not None and rows is not None:
        if not _cancels(value, rows):
            op.poison(value, "the weight that reads it is scaled otherwise")
            op.poison(rows, "its input is scaled otherwise")
        rows = None
    elif value is not None:
        _consume(op, value, weight)
    if rows is None:
        op.poison(op.value(bias), "a bias alone cannot be scaled")
        return None
    if not rows.constant_along(1):
        op.poison(rows, _MIXED)
        return None
    ids = rows.ids[:, 0].expand(op.shape)
    if isinstance(bias, fx.Node) and not joins_broadcast(op, bias, ids, rows.degree):
        op.poison(rows, f"the bias {bias} is not scaled along")
        return None
    return Scaled(ids, rows.degree)


def _cancels(x: Scaled, weight: Scaled) -> bool:
    """Whether ``weight`` (N, K) undoes ``x`` (..., K) column by column."""
    return (
        x.degree == -weight.degree
        and weight.constant_along(0)
        and all(x.constant_along(dim) for dim in range(x.ids.ndim - 1))
        and torch.equal(_first_row(x.ids), weight.ids[0])
    )


def _first_row(ids: Tensor) -> Tensor:
    return ids[(0,) * (ids.ndim - 1)]


def _consume(op: Op, value: Scaled, weight: fx.Node) -> None:
    if not all(value.constant_along(dim) for dim in range(value.ids.ndim - 1)):
        op.poison(value, "its scale differs from token to token")
        return
    ids = _first_row(value.ids).expand(weight.meta["val"].shape)
    if not op.join(weight, ids, -value.degree):
        op.poison(
            value, f"{weight} cannot undo the scale: it is no parameter, or is scaled otherwise already"
        )


_Q = example(1, 4, 3, 8)
_KV = example(1, 2, 3, 8)
_HEADS = torch.arange(32, dtype=torch.int32).reshape(1, 4, 1, 8)
_FEW = torch.arange(16, dtype=torch.int32).reshape(1, 2, 1, 8)


@rule(
    aten.scaled_dot_product_attention.default,
    samples=[
        Sample((_Q, _Q, _Q), scale={2: _HEADS}),
        Sample((_Q, _Q, _Q, None, 0.0, True), scale={2: _HEADS}),
        Sample((_Q, _KV, _KV), scale={2: _FEW}, kwargs={"enable_gqa": True}),
        Sample((_Q, _Q, _Q), scale={0: _HEADS}, alive=0),
        Sample((_Q, _Q, _Q), scale={2: torch.arange(3, dtype=torch.int32)[:, None]}, alive=0),
    ],
)
def attention(op: Op) -> Value:
    """``softmax(q k^T) v`` is linear in ``v``: its channels pass, query heads repeating those they share."""
    q, k, v = (op.value(op.args[i]) for i in range(3))
    for value, role in ((q, "queries"), (k, "keys")):
        op.poison(value, f"{role} are compared in a softmax")
    _poison_mask(op, op.arg(3, "attn_mask"))
    if v is None:
        return None
    if not v.constant_along(v.ids.ndim - 2):
        op.poison(v, "attention mixes tokens that are scaled differently")
        return None
    ids = v.ids.narrow(-2, 0, 1)
    heads = op.shape[-3]
    if ids.shape[-3] != heads:
        ids = ids.repeat_interleave(heads // ids.shape[-3], dim=-3)
    return Scaled(ids.expand(op.shape), v.degree)


def _poison_mask(op: Op, mask: Any) -> None:
    op.poison(op.value(mask), "it is a mask inside a softmax")
