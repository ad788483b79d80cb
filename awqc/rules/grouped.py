"""Linears of experts on rows sorted by expert: each expert's channels are its own."""

from __future__ import annotations

import torch
from torch import Tensor, fx

from awqc.rules import Sample, example, rule
from awqc.scaleflow.op import Op
from awqc.scaleflow.routing import Routing, routing_key
from awqc.scaleflow.scaled import Scaled, Value, unexpanded
from awqc.views import GROUPED_LINEAR, shape

_X = example(7, 4)
_W = example(3, 5, 4)
_OFFSETS = torch.tensor([2, 2, 6])
_K = torch.arange(4, dtype=torch.int32)
_N = torch.arange(5, dtype=torch.int32)
_EN = torch.arange(15, dtype=torch.int32).reshape(3, 5, 1)


@rule(
    GROUPED_LINEAR,
    rows=True,
    samples=[
        Sample((_X, _W, _OFFSETS), scale={0: _K}, parameters=(1,)),
        Sample((_X, _W, _OFFSETS), scale={1: _N[:, None]}, parameters=(1,)),
        Sample((_X, _W, _OFFSETS), scale={1: _EN}, parameters=(1,)),
        Sample((_X, _W, _OFFSETS), scale={1: _EN.flip(0)}, parameters=(1,)),
        Sample((_X, _W, _OFFSETS), scale={1: _EN * _EN}, parameters=(1,), alive=182),
        Sample((_X, _W, _OFFSETS), scale={1: _K}, parameters=(1,), alive=0),
        Sample((_X, _W, _OFFSETS), scale={0: _K}, alive=0),
        Sample((_X, _W, _OFFSETS), scale={0: torch.arange(7)[:, None]}, parameters=(1,), alive=0),
        Sample((_X, _W, _OFFSETS), scale={0: _K, 1: _N[:, None]}, parameters=(1,), alive=0),
    ],
)
def grouped_linear(op: Op) -> Value:
    """Row ``s`` meets the weight of its expert: scaled rows ``(e, n)`` of the weights scale channel ``n`` of
    the rows of ``e``; a scaled input is undone in the columns of each expert's own weight."""
    x, weight, offsets = op.args
    value, stack = op.value(x), op.value(weight)
    count = shape(weight)[0]
    key, holds_offsets = routing_key(offsets, count)
    op.poison(op.value(offsets), "it decides which expert serves a row")
    if value is not None:
        columns = _columns(op, value, key, count)
        if columns is None:
            op.poison(value, "its scale differs from row to row")
        elif stack is not None:
            if value.degree != -stack.degree or not _equal(stack.ids, columns[:, None]):
                op.poison(value, "the weight that reads it is scaled otherwise")
                op.poison(stack, "its input is scaled otherwise")
        elif not op.join(weight, columns[:, None].expand(shape(weight)), -value.degree):
            reason = "cannot undo the scale: it is no parameter, or is scaled otherwise already"
            op.poison(value, f"{weight} {reason}")
        return None
    if stack is None:
        return None
    if not stack.constant_along(2):
        op.poison(stack, "the channels that are summed carry different scales")
        return None
    ids = op.families.enter(key, stack.ids[:, :, 0])
    if ids is None:
        op.poison(stack, "the channels of the experts are not evenly spaced")
        return None
    routing = Routing.of_rows(key, op.shape, holds_offsets) if op.families.hold(ids) else None
    return Scaled(ids.expand(op.shape), stack.degree, routing)


def _columns(op: Op, x: Scaled, key: fx.Node, count: int) -> Tensor | None:
    """The channel of each input column at each expert, ``(E, K)``; None if that is not all that matters."""
    if not x.constant_along(0):
        return None
    routing = x.routing
    if routing is not None and not (routing.key is key and routing.in_place()):
        return None
    return op.families.table(x.ids[0], count)


def _equal(ids: Tensor, others: Tensor) -> bool:
    # Where neither changes, one element says it for all: the whole may be thousands of millions.
    return torch.equal(*torch.broadcast_tensors(unexpanded(ids), unexpanded(others)))
