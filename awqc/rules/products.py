"""Matrix products of any shape: what is not summed keeps its scale, what is summed must be undone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from awqc.rules import Sample, example, rule
from awqc.rules.elementwise import multiplied
from awqc.scaleflow.op import Op
from awqc.scaleflow.scaled import Scaled, Value
from awqc.views import operand, shape

aten = torch.ops.aten

_MIXED = "the channels that are summed carry different scales"


@dataclass(frozen=True)
class Factor:
    """An operand of a product.

    Args:
        node: what is multiplied.
        labels: a name for each of its dimensions; None for one of size 1 that is broadcast.
    """

    node: fx.Node
    labels: tuple[str | None, ...]


def contract(op: Op, left: Factor, right: Factor, result: Sequence[str]) -> Value:
    """The product of two factors, summed over the labels that are not in ``result``.

    Scales along other labels pass. Where those of one factor differ along what is summed, the other factor
    undoes them: it joins if it is a parameter.
    """
    labels = [*result, *dict.fromkeys(x for x in (*left.labels, *right.labels) if x and x not in result)]
    summed = range(len(result), len(labels))
    a, b = _aligned(op, left, labels), _aligned(op, right, labels)
    inner_a, inner_b = _varies(a, summed), _varies(b, summed)
    if inner_a and inner_b:
        assert a is not None
        assert b is not None
        if not _cancel(a, b, labels, left, right):
            op.poison(a, "both factors of a product are scaled")
            op.poison(b, "both factors of a product are scaled")
        return None
    if inner_a:
        _undo(op, a, b, right, labels)
        a = None
    elif a is not None and (ids := _onto(right, a, labels)) is not None:
        op.meet(right.node, ids)
    if inner_b:
        _undo(op, b, a, left, labels)
        b = None
    elif b is not None and (ids := _onto(left, b, labels)) is not None:
        op.meet(left.node, ids)
    outer = [None if v is None else Scaled(_first(v.ids, summed).expand(op.shape), v.degree) for v in (a, b)]
    return multiplied(op, outer[0], outer[1])


def _aligned(op: Op, factor: Factor, labels: list[str]) -> Scaled | None:
    """The value of a factor with a dimension for each of ``labels``, of size 1 where it has none."""
    value = op.value(factor.node)
    if value is None:
        return None
    ids = value.ids
    for dim in reversed([dim for dim, label in enumerate(factor.labels) if label is None]):
        ids = ids.select(dim, 0)
    own = [label for label in factor.labels if label is not None]
    ids = ids.permute([own.index(label) for label in labels if label in own])
    for dim, label in enumerate(labels):
        if label not in own:
            ids = ids.unsqueeze(dim)
    return Scaled(ids, value.degree)


def _varies(value: Scaled | None, dims: Sequence[int]) -> bool:
    return value is not None and not all(value.constant_along(dim) for dim in dims)


def _first(ids: Tensor, dims: Sequence[int]) -> Tensor:
    """``ids`` at the first index of ``dims``, the last dimensions."""
    for _ in dims:
        ids = ids[..., 0]
    return ids


def _cancel(a: Scaled, b: Scaled, labels: list[str], left: Factor, right: Factor) -> bool:
    """Whether the factors divide and multiply each term of the sums alike."""
    shared = [label in left.labels and label in right.labels for label in labels]
    if a.degree != -b.degree or _varies(a, _lacking(shared)) or _varies(b, _lacking(shared)):
        return False
    for dim in _lacking(shared):
        a, b = (Scaled(v.ids.narrow(dim, 0, 1), v.degree) for v in (a, b))
    return torch.equal(a.ids, b.ids)


def _lacking(there: list[bool]) -> list[int]:
    return [dim for dim, known in enumerate(there) if not known]


def _undo(op: Op, value: Scaled | None, other: Scaled | None, factor: Factor, labels: list[str]) -> None:
    """Let ``factor``, whose value is ``other``, undo ``value``, or refuse."""
    assert value is not None
    ids = _onto(factor, value, labels)
    if other is not None or ids is None:
        op.poison(value, _MIXED)
    elif not op.join(factor.node, ids, -value.degree):
        op.poison(value, f"{_MIXED}, and {factor.node} cannot undo it")


def _onto(factor: Factor, value: Scaled, labels: list[str]) -> Tensor | None:
    """The ids that each element of ``factor`` meets; None if it meets several."""
    lacking = _lacking([label in factor.labels for label in labels])
    if _varies(value, lacking):
        return None
    ids = value.ids
    for dim in reversed(lacking):
        ids = ids.select(dim, 0)
    own = [label for label in labels if label in factor.labels]
    ids = ids.permute([own.index(label) for label in factor.labels if label is not None])
    for dim, label in enumerate(factor.labels):
        if label is None:
            ids = ids.unsqueeze(dim)
    return ids.expand(shape(factor.node))


_A = example(2, 3, 4)
_C = example(2, 4, 5)
_X = example(3, 8)
_M = example(8, 5)
_K = torch.arange(8, dtype=torch.int32)
_ROWS = torch.arange(3, dtype=torch.int32)[:, None]
_COLUMNS = torch.arange(5, dtype=torch.int32)
_FOUR = torch.arange(4, dtype=torch.int32)
_EACH = torch.arange(8, dtype=torch.int32).reshape(2, 1, 4)

_BATCHED = [
    Sample((_A, _C), scale={1: _COLUMNS}),
    Sample((_A, _C), scale={0: _ROWS}),
    Sample((_A, _C), scale={0: _FOUR}, alive=0),
    Sample((_A, _C), scale={1: _FOUR[:, None]}, alive=0),
    Sample((_A, _C), scale={0: _FOUR}, parameters=(1,)),
    Sample((_A, _C), scale={0: _EACH}, parameters=(1,)),
    Sample((_A, _C), scale={1: _EACH.mT}, parameters=(0,)),
    Sample((_A, _C), scale={0: torch.arange(12).reshape(3, 4)}, parameters=(1,), alive=0),
    Sample((_A, _C), scale={0: _ROWS, 1: _COLUMNS + 3}, alive=3),
    Sample((_A, _C), scale={0: _EACH // 4, 1: _EACH.mT // 4}),
    Sample((_A, _C), scale={0: _EACH, 1: _EACH.mT}, alive=0),
    Sample((_A, _C), scale={0: _FOUR, 1: _COLUMNS + 4}, parameters=(1,), alive=5),
]


@rule(
    aten.matmul.default,
    samples=[
        *_BATCHED,
        Sample((_A[:, None], _C), scale={0: _EACH[:, None]}, parameters=(1,), alive=0),
        Sample((_A[:, None], _C), scale={0: _EACH[0]}, parameters=(1,)),
        Sample((_A, _C[:1]), scale={0: _EACH}, parameters=(1,), alive=0),
        Sample((_A, _C[:1]), scale={0: _EACH[0]}, parameters=(1,)),
        Sample((_A, _C[0]), scale={1: _COLUMNS}),
    ],
)
@rule(aten.bmm.default, samples=_BATCHED)
@rule(
    aten.mm.default,
    samples=[
        Sample((_X, _M), scale={0: _K}, parameters=(1,)),
        Sample((_X, _M), scale={1: _COLUMNS}, parameters=(1,)),
    ],
)
def matmul(op: Op) -> Value:
    """``A B``, with leading dimensions broadcast."""
    sizes = [shape(op.args[0]), shape(op.args[1])]
    if min(map(len, sizes)) < 2:
        for node in op.args:
            op.poison(op.value(node), "a vector product sums all channels")
        return None
    batch = [f"batch{i}" for i in range(len(op.shape) - 2)]

    def labels(size: tuple[int, ...], last: tuple[str, str]) -> tuple[str | None, ...]:
        own = batch[len(batch) - (len(size) - 2) :]
        spread = op.shape[len(batch) - len(own) : -2]
        known = zip(own, size[:-2], spread, strict=True)
        return (*(None if there == 1 < wide else label for label, there, wide in known), *last)

    left = Factor(op.args[0], labels(sizes[0], ("m", "k")))
    right = Factor(op.args[1], labels(sizes[1], ("k", "n")))
    return contract(op, left, right, [*batch, "m", "n"])


_EQUATION = "bshd,hdf->bsf"


@rule(
    aten.einsum.default,
    samples=[
        Sample(("bmk,bkn->bmn", [_A, _C]), scale={0: _EACH}, parameters=(1,)),
        Sample(("bmk,bkn->bmn", [_A, _C]), scale={1: _COLUMNS}),
        Sample(("bmk, bkn -> nbm", [_A, _C]), scale={1: _COLUMNS}),
        Sample(("...mk,kn->...mn", [_A, _M[:4]]), scale={0: _FOUR}, parameters=(1,)),
        Sample(("mk,kn", [_X, _M]), scale={0: _K}, parameters=(1,)),
        Sample(("mk,kn", [_X, _M]), scale={0: _K}, alive=0),
        Sample((_EQUATION, [example(2, 3, 2, 4), example(2, 4, 5)]), scale={0: _EACH[:, 0]}, parameters=(1,)),
        Sample((_EQUATION, [example(2, 3, 2, 4), example(2, 4, 5)]), scale={1: _COLUMNS}),
        Sample(("ij->ji", [_X]), scale={0: _K}),
        Sample(("ij->j", [_X]), scale={0: _K}),
        Sample(("ij->i", [_X]), scale={0: _K}, alive=0),
        Sample(("ii->i", [_C[:, :, :4][0]]), scale={0: _FOUR}, alive=0),
        Sample(("ij,jk,kl->il", [_X, _M, _M.mT]), scale={2: _K}, alive=0),
    ],
)
def einsum(op: Op) -> Value:
    """A product of two factors, or a permuted sum of one."""
    nodes = list(op.args[1])
    found = einsum_labels(op.node)
    if found is None or len(nodes) > 2:
        for node in nodes:
            op.poison(op.value(node), f"the sum {op.args[0]!r} is not followed")
        return None
    (*inputs, result) = found
    if len(nodes) == 2:
        left, right = (Factor(node, own) for node, own in zip(nodes, inputs, strict=True))
        return contract(op, left, right, result)
    value = _aligned(op, Factor(nodes[0], inputs[0]), [*result, *(x for x in inputs[0] if x not in result)])
    if value is None:
        return None
    summed = range(len(result), value.ids.ndim)
    if _varies(value, summed):
        op.poison(value, _MIXED)
        return None
    return Scaled(_first(value.ids, summed), value.degree)


def einsum_labels(node: fx.Node) -> list[tuple[str, ...]] | None:
    """The names of each operand's dimensions, then of the result's, dots spelled out; None if an operand
    has a name twice."""
    equation, nodes = operand(node, 0).replace(" ", ""), operand(node, 1)
    inputs, arrow, result = equation.partition("->")
    terms = inputs.split(",")
    widths = [len(shape(n)) - len(term.replace("...", "")) for n, term in zip(nodes, terms, strict=True)]
    dots = [f".{i}" for i in range(max(widths))]

    def spelled(term: str, width: int) -> tuple[str, ...]:
        before, there, after = term.partition("...")
        return (*before, *(dots[len(dots) - width :] if there else ()), *after)

    found = [spelled(term, width) for term, width in zip(terms, widths, strict=True)]
    if any(len(set(labels)) != len(labels) for labels in found):
        return None
    if arrow:
        return [*found, spelled(result, len(dots))]
    letters = [x for labels in found for x in labels if x not in dots]
    return [*found, (*dots, *sorted(x for x in set(letters) if letters.count(x) == 1))]
