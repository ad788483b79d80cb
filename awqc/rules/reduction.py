"""Sums and lookups: what is added, or picked by values unknown, must carry one scale."""

from __future__ import annotations

import torch
from torch import fx

from awqc.op import Op
from awqc.rules import Sample, example, rule
from awqc.scaled import Scaled, Value

aten = torch.ops.aten

_X = example(2, 3, 8)
_IDS = torch.arange(8, dtype=torch.int32)


@rule(
    aten.sum.dim_IntList,
    aten.mean.dim,
    samples=[
        Sample((_X, [1]), scale={0: _IDS}),
        Sample((_X, [1], True), scale={0: _IDS}),
        Sample((_X, [-1]), scale={0: _IDS}, alive=0),
    ],
)
def reduce(op: Op) -> Value:
    """A sum over dimensions along which the ids do not change keeps them."""
    value = op.value(op.args[0])
    if value is None:
        return None
    ndim, ids = value.ids.ndim, value.ids
    dims = sorted({d % ndim for d in (op.arg(1, "dim") or range(ndim))}, reverse=True)
    for dim in dims:
        if not value.constant_along(dim):
            op.poison(value, "sums over channels that carry different scales")
            return None
        ids = ids.narrow(dim, 0, 1) if op.arg(2, "keepdim", False) else ids.select(dim, 0)
    return Scaled(ids, value.degree)


@rule(
    aten.embedding.default,
    samples=[
        Sample(
            (example(5, 8), torch.tensor([[0, 3, 3]])),
            scale={0: _IDS},
            parameters=(0,),
        ),
        Sample(
            (example(5, 8), torch.tensor([[0, 3, 3]])),
            scale={0: torch.arange(5, dtype=torch.int32)[:, None]},
            parameters=(0,),
            alive=0,
        ),
    ],
)
def embedding(op: Op) -> Value:
    """A lookup of rows keeps the scales of the columns."""
    table = op.value(op.args[0])
    if table is None:
        return None
    if not table.constant_along(0):
        op.poison(table, "rows that are looked up carry different scales")
        return None
    return Scaled(table.ids[0].expand(op.shape), table.degree)


_GRID = example(2, 3, 4, 8)
_ROWS = torch.arange(4, dtype=torch.int32)[:, None]


@rule(
    aten.index.Tensor,
    samples=[
        Sample((_GRID, [None, None, torch.tensor([-1])]), scale={0: _ROWS}, constants=(1,), alive=4),
        Sample((_GRID, [None, None, torch.tensor([3, 1])]), scale={0: _IDS}),
        Sample((_GRID, [torch.tensor([[1, 0, 1]]), torch.tensor([[2], [0]])]), scale={0: _IDS}),
        Sample((_GRID, [None, None, torch.tensor([-1])]), scale={0: _ROWS}, alive=0),
        Sample((_GRID, [None, None, torch.tensor([True, False, True, True])]), scale={0: _IDS}, alive=0),
    ],
)
def index(op: Op) -> Value:
    """Rows picked by constants take their ids along; rows picked by anything else must carry one scale."""
    value = op.value(op.args[0])
    if value is None:
        return None
    picks: list[torch.Tensor | None] = []
    for dim, where in enumerate(op.args[1]):
        if not isinstance(where, fx.Node):
            picks.append(None)
            continue
        known = op.constant(where)
        fake = where.meta["val"]
        if fake.dtype == torch.bool or (known is None and not value.constant_along(dim)):
            op.poison(value, f"picks by {where}, whose values are not known, what is scaled differently")
            return None
        one = torch.zeros([1] * fake.ndim, dtype=torch.long)
        picks.append(one if value.constant_along(dim) or known is None else known)
    ids = op.node.target(value.core(), picks)  # type: ignore[operator]
    return Scaled(ids.expand(op.shape), value.degree)
