"""Give every linear-like op one form, and drop what computes nothing.

    addmm(b, x, W)  with W (K, N)   ->  linear(x, permute(W), b)
    mm/matmul(x, W)                 ->  linear(x, permute(W))
    matmul(x, permute(W))           ->  linear(x, W)
    to(x, dtype of x), alias, detach ->  x
    _assert_tensor_metadata(...)    ->  (gone)
    relu_(x), add_(x, y), ...       ->  relu(x), add(x, y), ...

``W`` must be a parameter (or its transpose) and two-dimensional: then ``x @ W`` is the linear it says. An
in-place op is replaced if no other view of what it writes is read afterwards; one that stays has no scale
rule, so no scale passes it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx
from torch.multiprocessing.reductions import StorageWeakRef

from awqc.context import Context
from awqc.graph import Graph
from awqc.pipeline import Pass
from awqc.views import dtype, shape, weight_behind

aten = torch.ops.aten

_NO_EFFECT = {
    aten._assert_tensor_metadata.default,
    aten._assert_scalar.default,
    aten._assert_async.msg,
}
_SAME = {aten.alias.default, aten.detach.default, aten.detach_.default, aten.lift_fresh_copy.default}
_CASTS = {aten.to.dtype, aten.to.dtype_layout, aten.to.device, aten._to_copy.default, aten.type_as.default}


@dataclass(frozen=True)
class Canonicalize(Pass):
    """One form for linears; casts, aliases and asserts without effect removed."""

    name: ClassVar[str] = "canonicalize"

    def run(self, graph: Graph, context: Context) -> None:
        _remove_mutation(graph)
        for node in graph.nodes:
            if node.op != "call_function":
                continue
            if node.target in _NO_EFFECT:
                graph.fx.erase_node(node)
            elif _is_identity(node):
                node.replace_all_uses_with(node.args[0])  # type: ignore[arg-type]
                graph.fx.erase_node(node)
            elif node.target in (aten.addmm.default, aten.mm.default, aten.matmul.default):
                _to_linear(graph.fx, node)
        _merge_weight_expressions(graph)
        graph.fx.eliminate_dead_code()
        graph.changed()


def _remove_mutation(graph: Graph) -> None:
    order = graph.order()
    storages: dict[StorageWeakRef, list[fx.Node]] = {}
    for node in order:
        if isinstance(node.meta.get("val"), torch.Tensor):
            storages.setdefault(_storage(node), []).append(node)
    for node in order:
        functional = _functional(node)
        if functional is None:
            continue
        written = node.args[0]
        assert isinstance(written, fx.Node)
        views = [n for n in storages[_storage(written)] if order[n] < order[node]]
        if any(n.op != "call_function" for n in views):
            continue  # a parameter or an input changes
        if any(order[u] > order[node] for n in views if n is not written for u in n.users):
            continue
        for user in list(written.users):
            if order[user] > order[node]:
                user.replace_input_with(written, node)
        node.target = functional


def _storage(node: fx.Node) -> StorageWeakRef:
    return StorageWeakRef(node.meta["val"].untyped_storage())


def _mutates(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and bool(node.target._schema.is_mutable)


def _functional(node: fx.Node) -> torch._ops.OpOverload | None:
    """The op that computes what the in-place ``node`` writes, if there is one of the same dtype."""
    target = node.target
    if not isinstance(target, torch._ops.OpOverload) or not _mutates(node):
        return None
    name, overload = target._schema.name.removeprefix("aten::"), target._overloadname
    packet = getattr(aten, name.removesuffix("_"), None) if name.endswith("_") else None
    alike = all(dtype(n) == dtype(node) for n in node.all_input_nodes if dtype(n).is_floating_point)
    return getattr(packet, overload, None) if alike else None


def _is_identity(node: fx.Node) -> bool:
    if node.target in _SAME:
        return True
    source = node.args[0] if node.args else None
    if node.target not in _CASTS or not isinstance(source, fx.Node):
        return False
    before, after = source.meta["val"], node.meta["val"]
    return bool(before.dtype == after.dtype and before.device == after.device)


def _to_linear(nodes: fx.Graph, node: fx.Node) -> None:
    bias, x, weight = None, node.args[0], node.args[1]
    if node.target is aten.addmm.default:
        if node.kwargs.get("alpha", 1) != 1 or node.kwargs.get("beta", 1) != 1:
            return
        bias, x, weight = node.args[:3]
        if not isinstance(bias, fx.Node) or len(shape(bias)) != 1 or bias.op != "get_attr":
            return
    if not isinstance(x, fx.Node) or not isinstance(weight, fx.Node) or len(shape(x)) < 2:
        return
    found = weight_behind(weight)
    if found is None:
        return
    attr, transposed = found
    with nodes.inserting_before(node):
        stored = attr if transposed else _transpose(nodes, attr)
        new = nodes.call_function(aten.linear.default, (x, stored) if bias is None else (x, stored, bias))
    new.meta = dict(node.meta)
    node.replace_all_uses_with(new)
    nodes.erase_node(node)


def _transpose(nodes: fx.Graph, weight: fx.Node) -> fx.Node:
    """``weight`` (K, N) as the (N, K) that ``linear`` takes."""
    node = nodes.call_function(aten.permute.default, (weight, [1, 0]))
    node.meta["val"] = weight.meta["val"].t()
    return node


def _merge_weight_expressions(graph: Graph) -> None:
    """Equal expressions of parameters become one node, so that each is changed in one place."""
    seen: dict[object, fx.Node] = {}
    weight_only: set[fx.Node] = set()
    for node in graph.nodes:
        if node.op == "get_attr":
            weight_only.add(node)
        operands = node.all_input_nodes
        if node.op != "call_function" or not operands or not all(n in weight_only for n in operands):
            continue
        if not isinstance(node.meta["val"], torch.Tensor) or any(map(_mutates, (node, *node.users))):
            continue
        weight_only.add(node)
        key = (node.target, str(node.args), str(node.kwargs), dtype(node))
        if key in seen:
            node.replace_all_uses_with(seen[key])
            graph.fx.erase_node(node)
        else:
            seen[key] = node
