"""Lookups and dispatch: what is picked or placed by values unknown must carry one scale."""

from __future__ import annotations

import torch
from torch import fx

from awqc.rules import Sample, example, rule
from awqc.rules.creation import is_zero
from awqc.rules.sums import agreed
from awqc.scaleflow.op import Op
from awqc.scaleflow.routing import Routing
from awqc.scaleflow.scaled import Scaled, Value
from awqc.views import picked, shape

aten = torch.ops.aten

_X = example(2, 3, 8)
_IDS = torch.arange(8, dtype=torch.int32)


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
_SQUARES = torch.tensor([[0], [1], [4]])


@rule(
    aten.index.Tensor,
    samples=[
        Sample((_GRID, [None, None, torch.tensor([-1])]), scale={0: _ROWS}, constants=(1,), alive=4),
        Sample((_GRID, [None, None, torch.tensor([3, 1])]), scale={0: _IDS}),
        Sample((_GRID, [torch.tensor([[1, 0, 1]]), torch.tensor([[2], [0]])]), scale={0: _IDS}),
        Sample((_GRID, [None, None, torch.tensor([-1])]), scale={0: _ROWS}, alive=0),
        Sample((_GRID[0], [torch.tensor([2, 0, 2])]), scale={0: torch.arange(96).reshape(3, 4, 8)}),
        Sample((_GRID[0], [torch.tensor([[2], [0]])]), scale={0: torch.arange(12).reshape(3, 4, 1)}),
        Sample(
            (_GRID[0], [torch.tensor([2, 0, 2])]), scale={0: torch.arange(3)[:, None, None] ** 2}, alive=2
        ),
        Sample((_GRID, [None, None, torch.tensor([True, False, True, True])]), scale={0: _IDS}, alive=0),
    ],
)
def index(op: Op) -> Value:
    """Rows picked by constants take their ids along; rows picked by anything else must carry one scale."""
    value = op.value(op.args[0])
    if value is None:
        return None
    one = picked(op.node)
    if one is not None and not op.on_rows and op.constant(one[1]) is None and not value.constant_along(0):
        return _of_experts(op, value, one[1])
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
        first = torch.zeros([1] * fake.ndim, dtype=torch.long)
        picks.append(first if value.constant_along(dim) or known is None else known)
    ids = op.node.target(value.core(), picks)  # type: ignore[operator]
    return Scaled(ids.expand(op.shape), value.degree)


def _of_experts(op: Op, value: Scaled, by: fx.Node) -> Value:
    """The entries of a table, one for each expert, that ``by`` picks: known up to the expert."""
    core = value.core()
    families = op.families.enter(by, core.flatten(1))
    if families is None:
        op.poison(value, f"picks by {by}, whose values are not known, what is scaled differently")
        return None
    ids = families.reshape(*[1] * len(shape(by)), *core.shape[1:]).expand(op.shape)
    return Scaled(ids, value.degree, Routing.of_rows(by, op.shape))


_PICK = torch.tensor([1, 0, 1, 1])


@rule(
    aten.index_select.default,
    samples=[
        Sample((_X, 0, _PICK), scale={0: _IDS}),
        Sample((_X, 2, torch.tensor([5, 0])), scale={0: _IDS}, alive=0),
        Sample((_X, 2, torch.tensor([5, 0])), scale={0: _IDS}, constants=(1,)),
    ],
)
def index_select(op: Op) -> Value:
    """Slices picked along one dimension."""
    value, dim, by = op.value(op.args[0]), op.args[1], op.args[2]
    if value is None:
        return None
    known = op.constant(by)
    if value.constant_along(dim):
        return Scaled(value.ids.narrow(dim, 0, 1).expand(op.shape), value.degree)
    if known is None:
        op.poison(value, f"picks by {by}, whose values are not known, what is scaled differently")
        return None
    return Scaled(value.ids.index_select(dim, known), value.degree)


@rule(
    aten.gather.default,
    samples=[
        Sample((_X, 1, torch.tensor([[[2, 0], [1, 1]]])), scale={0: _IDS}),
        Sample((_X, 2, torch.tensor([[[2, 0], [1, 1]]])), scale={0: _IDS}, alive=0),
    ],
)
def gather(op: Op) -> Value:
    """Elements picked along one dimension, each by an index of its own."""
    value, dim = op.value(op.args[0]), op.args[1]
    if value is None:
        return None
    if not value.constant_along(dim):
        op.poison(value, f"picks by {op.args[2]} what is scaled differently")
        return None
    ids = value.ids.narrow(dim, 0, 1)
    for other, size in enumerate(op.shape):
        if other != dim % ids.ndim:
            ids = ids.narrow(other, 0, size)
    return Scaled(ids.expand(op.shape), value.degree)


_ADDED = example(2, 4, 8)


@rule(
    aten.index_add.default,
    aten.index_copy.default,
    samples=[
        Sample((_X, 1, torch.tensor([2, 0, 1]), example(2, 3, 8)), scale={0: _IDS, 2: _IDS}),
        Sample((_X, 1, torch.tensor([2, 0, 1]), example(2, 3, 8)), scale={2: _IDS}, alive=0),
        Sample((_X, 2, torch.tensor([2, 0]), example(2, 3, 2)), scale={0: _IDS}, alive=0),
    ],
)
def place_slices(op: Op) -> Value:
    """Slices added to, or put in the place of, those picked along one dimension."""
    base, dim, source = op.args[0], op.args[1], op.args[3]
    return _placed(op, base, dim, source)


@rule(
    aten.scatter.src,
    aten.scatter_add.default,
    samples=[
        Sample((_X, 1, torch.zeros(2, 3, 8).long(), _X), scale={0: _IDS, 2: _IDS}),
        Sample((_X, 1, torch.zeros(2, 2, 5).long(), _X), scale={0: _IDS, 2: _IDS}),
        Sample((_X, 1, torch.zeros(2, 3, 8).long(), _X), scale={2: _IDS}, alive=0),
        Sample((_X, 2, torch.zeros(2, 3, 8).long(), _X), scale={0: _IDS, 2: _IDS}, alive=0),
    ],
)
def place_elements(op: Op) -> Value:
    """Elements put along one dimension, each where an index of its own says."""
    return _placed(op, op.args[0], op.args[1], op.args[3])


def _placed(op: Op, base: fx.Node, dim: int, source: fx.Node) -> Scaled | None:
    """``base`` with ``source`` in some of its places along ``dim``: both must be divided alike."""
    size = shape(base)
    dim %= len(size)
    found = []
    for node in (base, source):
        value = op.value(node)
        if value is not None and not value.constant_along(dim):
            op.poison(value, "places by values that are not known what is scaled differently")
            return None
        found.append(value)
    below, above = found
    if above is not None:
        ids = above.ids.narrow(dim, 0, 1)
        for other, wide in enumerate(size):
            if other != dim and ids.shape[other] != wide:
                ids = ids.narrow(other, 0, 1) if above.constant_along(other) else _grown(ids, other, wide)
        above = Scaled(ids.expand(size), above.degree)
    if below is not None and above is not None:
        return agreed(op, below, above)
    if above is not None and is_zero(base):
        return above
    op.poison(below, f"{source}, which is placed in it, is not scaled along")
    op.poison(above, f"is placed in {base}, which is not scaled along")
    return None


def _grown(ids: torch.Tensor, dim: int, size: int) -> torch.Tensor:
    """``ids`` with -1 behind its end along ``dim``."""
    rest = [*ids.shape[:dim], size - ids.shape[dim], *ids.shape[dim + 1 :]]
    return torch.cat([ids, ids.new_full(rest, -1)], dim)


@rule(
    aten.sort.default,
    samples=[
        Sample((_X, 1), scale={0: _IDS}),
        Sample((_X, 1, True), scale={0: _IDS}),
        Sample((_X,), scale={0: _IDS}, alive=0),
    ],
)
@rule(
    aten.topk.default,
    samples=[Sample((_X, 2, 1), scale={0: _IDS}), Sample((_X, 2), scale={0: _IDS}, alive=0)],
)
def in_order(op: Op) -> Value:
    """Elements that are divided alike, in their order, and where they were, which nothing divides."""
    value = op.value(op.args[0])
    dim = op.arg(2, "dim", -1) if op.node.target is aten.topk.default else op.arg(1, "dim", -1)
    if value is None:
        return None
    if not value.constant_along(dim):
        op.poison(value, "compares channels that carry different scales")
        return None
    ids = value.ids.narrow(dim, 0, 1)
    first = op.node.meta["val"][0]
    return [Scaled(ids.expand(first.shape), value.degree), None]
