"""What every node of a lowered graph moves and computes, and the least time that takes.

The floor of a node is the larger of two times: that of moving its operands and its result once, and that of
its products at the device's rate for 16-bit numbers. Of a quantized weight the bytes count that its scheme
needs; what an implementation moves beyond (a weight written out dense, partial sums) is in the bytes moved.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from awqc.inspection.subject import Subject
from awqc.kernels.launch import Launch, launches, nbytes
from awqc.page.layers import Layers
from awqc.quantized import packed_bytes
from awqc.runtime.experts import QuantExperts
from awqc.runtime.lowered_graph import node_name
from awqc.text import node_op
from awqc.views import REGROUPS, linear, operand

aten = torch.ops.aten
#: Ops that move nothing: they look at their operand in another way.
_LOOKS = {*REGROUPS, aten.expand.default, aten.alias.default, aten.detach.default} - {aten.clone.default}
#: Products of matrices: 2 operations for every element of the result and every term of its sum.
_PRODUCTS = (
    aten.linear.default,
    aten.mm.default,
    aten.bmm.default,
    aten.matmul.default,
    aten.addmm.default,
    torch.ops.awqc.grouped_linear.default,
)
_ATTENTION = (aten.scaled_dot_product_attention.default,)
#: Ops that read of their first operand what they return.
_PICKS = (
    aten.embedding.default,
    aten.index.Tensor,
    aten.index_select.default,
    aten.gather.default,
)


@dataclass(frozen=True)
class Rates:
    """What times are counted with.

    Args:
        read: bytes a second.
        product: 16-bit floating-point operations a second; None if nobody knows.
        source: where the figures come from.
    """

    read: float
    product: float | None
    source: str


@dataclass
class Cost:
    """One node.

    Args:
        name: of the node.
        op: what it does.
        linear: the quantized linear that it is, or the name of a float weight that it multiplies with.
        kind: the name within its layer, or the op.
        layer: path of the layer; empty outside of all.
        stage: the linears that read the same activation, and what follows up to the next, named by them.
        shapes: of the operands that are tensors and of the result.
        features: ``(N, K)`` of a linear.
        launches: what it runs.
        bytes: that must be moved.
        flops: of products of matrices.
        floor: seconds; None without rates.
        seconds: measured; None if not.
        note: why it was not measured.
    """

    name: str
    op: str
    linear: str | None
    kind: str
    layer: str
    stage: str
    shapes: str
    features: tuple[int, int] | None
    launches: list[Launch]
    bytes: int
    flops: int
    floor: float | None = None
    seconds: float | None = None
    note: str = ""

    @property
    def moved(self) -> int:
        """Bytes that the implementation moves."""
        return sum(launch.bytes for launch in self.launches)

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        plain = {k: v for k, v in vars(self).items() if k != "launches"}
        return plain | {"moved": self.moved, "launches": [one.as_dict() for one in self.launches]}


def costs(subject: Subject, rates: Rates | None = None) -> list[Cost]:
    """Every node that moves something, in the order in which they run."""
    layers, stage, found = subject.layers(), _Stages(subject), []
    for node in subject.graph.nodes:
        if node.op != "call_function":
            continue
        label = stage.of(node)
        if moves(node):
            found.append(_cost(subject, node, layers, label, rates))
    return found


def moves(node: fx.Node) -> bool:
    """Whether ``node`` moves or computes anything."""
    looks = node.target in _LOOKS or getattr(node.target, "is_view", True)
    return not looks and isinstance(node.meta.get("val"), (Tensor, list, tuple))


def _cost(subject: Subject, node: fx.Node, layers: Layers, stage: str, rates: Rates | None) -> Cost:
    target = node.target
    assert callable(target)
    args, value, name = arguments(node), result(node), subject.linear(node)
    if node.target in _PICKS:
        runs = [Launch(node_op(node), nbytes(*args[1:]) + nbytes(value), nbytes(value))]
    else:
        runs = launches(target, subject.hardware, args, value)
    dense = linear(node)
    least = _least(subject, args, value, name) if name else sum(launch.bytes for launch in runs)
    flops = _flops(subject, node, args, value, name)
    weight = name or (dense.name if dense else None)
    place = layers.place(weight) if weight else None
    found = Cost(
        node_name(node),
        node_op(node),
        weight,
        place.kind if place else node_op(node),
        place.layer if place else "",
        stage,
        _shapes(args, value),
        (value.shape[-1], args[0].shape[-1]) if weight else None,
        runs,
        least,
        flops,
    )
    if rates is not None:
        products = flops / rates.product if rates.product else 0.0
        found.floor = max(least / rates.read, products)
    return found


def _least(subject: Subject, args: list[Any], value: Any, name: str) -> int:
    """Input, result, bias, and the weight in its scheme; of experts, of those that can have rows."""
    module, x = subject.linears[name], args[0]
    rows = module.rows
    if isinstance(module, QuantExperts):
        busy = min(module.count, len(x)) if x.ndim == 2 else module.count
        rows = module.out_features * busy
    bias = module.operands().get("bias")
    return nbytes(x, value, bias) + packed_bytes(rows, module.in_features, module.scheme)


def _flops(subject: Subject, node: fx.Node, args: list[Any], value: Any, name: str | None) -> int:
    if name is not None:
        module = subject.linears[name]
        return int(2 * value.numel() * module.in_features)
    if node.target in _PRODUCTS:
        return int(2 * value.numel() * args[1 if node.target is aten.addmm.default else 0].shape[-1])
    if node.target in _ATTENTION:
        q, k = args[0], args[1]
        return int(2 * q.numel() * k.shape[-2] + 2 * value.numel() * k.shape[-2])
    return 0


class _Stages:
    """The label of the stage that each node of a graph belongs to, node by node in their order."""

    def __init__(self, subject: Subject) -> None:
        self._subject, self._layers = subject, subject.layers()
        self._readers: dict[fx.Node, list[str]] = {}
        for node in subject.graph.nodes:
            name = self._weight(node)
            if name is not None:
                self._readers.setdefault(_source(operand(node, 0)), []).append(name)
        self._now = "before the first linear"

    def of(self, node: fx.Node) -> str:
        """Label of the stage of ``node``, which comes after all nodes that were asked about."""
        if self._weight(node) is not None:
            self._now = _joined(
                [self._layers.place(n).kind for n in self._readers[_source(operand(node, 0))]]
            )
        return self._now

    def _weight(self, node: fx.Node) -> str | None:
        if node.op != "call_function":
            return None
        name, dense = self._subject.linear(node), linear(node)
        return name or (dense.name if dense else None)


def _source(x: fx.Node) -> fx.Node:
    """What computes ``x``, apart from the way in which its rows are grouped."""
    while x.op == "call_function" and x.target in REGROUPS:
        x = operand(x, 0)
    return x


def _joined(kinds: list[str]) -> str:
    """``a.b, a.c`` as ``a.b, c``."""
    first, *others = dict.fromkeys(kinds)
    prefix = first.rpartition(".")[0]
    return ", ".join([first, *(k.removeprefix(f"{prefix}.") if prefix else k for k in others)])


def arguments(node: fx.Node) -> list[Any]:
    """Operands of ``node`` in order, tensors on ``meta``."""
    values = fx.node.map_arg((node.args, tuple(node.kwargs.values())), lambda n: _meta(n.meta.get("val")))
    positional, named = values
    return [*positional, *named]


def result(node: fx.Node) -> Any:
    """What ``node`` computes, on ``meta``."""
    return _meta(node.meta.get("val"))


def _meta(value: Any) -> Any:
    if isinstance(value, Tensor):
        return torch.empty(tuple(value.shape), dtype=value.dtype, device="meta")
    return type(value)(_meta(item) for item in value) if isinstance(value, (list, tuple)) else value


def _shapes(args: list[Any], value: Any) -> str:
    def text(item: Any) -> Iterator[str]:
        if isinstance(item, Tensor):
            yield "x".join(map(str, item.shape)) or "scalar"
        elif isinstance(item, (list, tuple)):
            for part in item:
                yield from text(part)

    return f"{', '.join(text(args))} -> {', '.join(text(value))}"


def total(found: list[Cost], key: Callable[[Cost], str]) -> dict[str, list[Cost]]:
    """Costs by ``key``, in the order of their first."""
    by: dict[str, list[Cost]] = {}
    for cost in found:
        by.setdefault(key(cost), []).append(cost)
    return by


def find(subject: Subject, name: str) -> fx.Node | None:
    """The node called ``name``, or the one that multiplies with the weight of the linear ``name``."""
    for node in subject.graph.nodes:
        if node.op == "call_function" and name in (node.name, subject.linear(node)):
            return node
    return None


def like(names: list[str], wanted: str, most: int = 3) -> list[str]:
    """Some of ``names`` that ``wanted`` may have meant."""
    import difflib

    part = re.sub(r"\d+", "", wanted)
    ranked = difflib.get_close_matches(wanted, names, most, 0.3)
    return ranked or [name for name in names if part and part in re.sub(r"\d+", "", name)][:most]
