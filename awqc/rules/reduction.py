"""Reductions: what is added, compared or averaged must carry one scale."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from awqc.rules import Sample, example, rule
from awqc.scaleflow.op import Op
from awqc.scaleflow.scaled import Scaled, Value

aten = torch.ops.aten

_X = example(2, 3, 8)
_IDS = torch.arange(8, dtype=torch.int32)
_ONE_DIMENSIONAL = (aten.avg_pool1d.default, aten.max_pool1d.default, aten.adaptive_avg_pool1d.default)


@rule(
    aten.sum.dim_IntList,
    aten.mean.dim,
    aten.amax.default,
    aten.amin.default,
    samples=[
        Sample((_X, [1]), scale={0: _IDS}),
        Sample((_X, [1], True), scale={0: _IDS}),
        Sample((_X, [-1]), scale={0: _IDS}, alive=0),
    ],
)
def reduce(op: Op) -> Value:
    """A sum over dimensions along which the ids do not change keeps them."""
    return reduced(op, op.arg(1, "dim"), op.arg(2, "keepdim", False))


def reduced(op: Op, dims: int | Sequence[int] | None, keepdim: bool) -> Scaled | None:
    """The value of the first operand with one element left of each of ``dims`` (None: of all)."""
    value = op.value(op.args[0])
    if value is None:
        return None
    ndim, ids = value.ids.ndim, value.ids
    dims = [dims] if isinstance(dims, int) else dims or range(ndim)
    for dim in sorted({d % ndim for d in dims}, reverse=True):
        if not value.constant_along(dim):
            op.poison(value, "sums over channels that carry different scales")
            return None
        ids = ids.narrow(dim, 0, 1) if keepdim else ids.select(dim, 0)
    return Scaled(ids, value.degree)


@rule(
    aten.sum.default,
    aten.mean.default,
    aten.max.default,
    aten.min.default,
    samples=[Sample((_X,), scale={0: _IDS}, alive=0), Sample((_X,), scale={0: torch.zeros(1).int()})],
)
def reduce_all(op: Op) -> Value:
    """All elements together."""
    return reduced(op, None, False)


@rule(
    aten.linalg_vector_norm.default,
    samples=[
        Sample((_X, 2, [1]), scale={0: _IDS}),
        Sample((_X, 2, [1], True), scale={0: _IDS}),
        Sample((_X, 2, [-1]), scale={0: _IDS}, alive=0),
        Sample((_X, 0, [1]), scale={0: _IDS}, alive=0),
    ],
)
def vector_norm(op: Op) -> Value:
    """A norm is homogeneous; the number of elements that are not zero is none."""
    if op.arg(1, "ord", 2) == 0:
        op.poison(op.value(op.args[0]), "it is counted")
        return None
    return reduced(op, op.arg(2, "dim"), op.arg(3, "keepdim", False))


@rule(
    aten.max.dim,
    aten.min.dim,
    aten.median.dim,
    samples=[
        Sample((_X, 1), scale={0: _IDS}),
        Sample((_X, 1, True), scale={0: _IDS}),
        Sample((_X, -1), scale={0: _IDS}, alive=0),
    ],
)
def extreme(op: Op) -> Value:
    """The largest of elements that are divided alike, and where it is, which nothing divides."""
    return [reduced(op, op.args[1], op.arg(2, "keepdim", False)), None]


@rule(
    aten.argmax.default,
    aten.argmin.default,
    samples=[Sample((_X, 1), scale={0: _IDS}), Sample((_X, -1), scale={0: _IDS}, alive=0)],
)
def where_extreme(op: Op) -> Value:
    """A position, which nothing divides if those that are compared are divided alike."""
    reduced(op, op.arg(1, "dim"), False)
    return None


@rule(
    aten.cumsum.default,
    samples=[Sample((_X, 1), scale={0: _IDS}), Sample((_X, 2), scale={0: _IDS}, alive=0)],
)
def running(op: Op) -> Value:
    """A running sum along elements that are divided alike."""
    value = op.value(op.args[0])
    if value is not None and not value.constant_along(op.args[1]):
        op.poison(value, "sums over channels that carry different scales")
        return None
    return value


_IMAGE = example(2, 3, 6, 6)
_PLANES = torch.arange(3, dtype=torch.int32)[:, None, None]


@rule(
    aten.avg_pool2d.default,
    aten.max_pool2d.default,
    samples=[
        Sample((_IMAGE, [2, 2]), scale={0: _PLANES}),
        Sample((_IMAGE, [2, 2], [1, 1], [1, 1]), scale={0: _PLANES}),
        Sample((_IMAGE, [2, 2]), scale={0: torch.arange(6, dtype=torch.int32)}, alive=0),
    ],
)
@rule(aten.adaptive_avg_pool2d.default, samples=[Sample((_IMAGE, [2, 3]), scale={0: _PLANES})])
@rule(
    aten.avg_pool1d.default,
    aten.max_pool1d.default,
    samples=[Sample((_X, [2]), scale={0: torch.arange(3, dtype=torch.int32)[:, None]})],
)
@rule(
    aten.adaptive_avg_pool1d.default,
    samples=[Sample((_X, [2]), scale={0: torch.arange(3, dtype=torch.int32)[:, None]})],
)
@rule(
    aten.upsample_nearest2d.vec,
    samples=[Sample((_IMAGE, None, [2.0, 2.0]), scale={0: _PLANES})],
)
@rule(
    aten.upsample_bilinear2d.vec,
    aten.upsample_bicubic2d.vec,
    samples=[Sample((_IMAGE, None, False, [2.0, 2.0]), scale={0: _PLANES})],
)
def resample(op: Op) -> Value:
    """Averages, maxima and interpolations within the planes of an image, each divided by one scale."""
    value = op.value(op.args[0])
    if value is None:
        return None
    planes = 1 if op.node.target in _ONE_DIMENSIONAL else 2
    ids = value.ids
    for dim in range(ids.ndim - planes, ids.ndim):
        if not value.constant_along(dim):
            op.poison(value, "mixes what is scaled differently")
            return None
        ids = ids.narrow(dim, 0, 1)
    return Scaled(ids.expand(op.shape), value.degree)
