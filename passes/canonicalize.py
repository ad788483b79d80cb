"""Give every linear-like op one form, and drop what computes nothing.

    addmm(b, x, W)  with W (K, N)   ->  linear(x, permute(W), b)
    mm/matmul(x, W)                 ->  linear(x, permute(W))
    matmul(x, permute(W))           ->  linear(x, W)
    matmul(x, W)  with W (E, K, N)  ->  bmm(x, W)                                      x (E, T, K)
    grouped_mm(x, W, offsets)       ->  awqc.grouped_linear(x, permute(W), offsets)    x (S, K), W (E, K, N)
    to(x, dtype of x), alias, detach ->  x
    _assert_tensor_metadata(...)    ->  (gone)

``W`` must be a parameter (or its transpose): then ``x @ W`` is the linear it says, or those of several
experts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from awqc.context import Context
from awqc.functional import bases, written
from awqc.graph import Graph
from awqc.pipeline import Pass
from awqc.views import GROUPED_LINEAR, dtype, is_transpose, operand, shape, weight_behind

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
        base = bases(graph)
        overwritten = {base[tensor] for node in base for tensor in written(node)}
        for node in graph.nodes:
            if node.op != "call_function":
                continue
            if node.target in _NO_EFFECT:
                graph.fx.erase_node(node)
            elif _is_identity(node) and not _is_needed_copy(node, base, overwritten):
                node.replace_all_uses_with(operand(node, 0))
                graph.fx.erase_node(node)
            elif node.target in (aten.addmm.default, aten.mm.default, aten.matmul.default):
                _to_linear(graph.fx, node)
            elif _is_grouped(node):
                _to_grouped_linear(graph.fx, node)
        _merge_weight_expressions(graph)
        graph.fx.eliminate_dead_code()
        graph.changed()


def _is_identity(node: fx.Node) -> bool:
    if node.target in _SAME:
        return True
    source = operand(node, 0)
    if node.target not in _CASTS or not isinstance(source, fx.Node):
        return False
    before, after = source.meta["val"], node.meta["val"]
    return bool(before.dtype == after.dtype and before.device == after.device)


def _is_needed_copy(node: fx.Node, base: dict[fx.Node, fx.Node], overwritten: set[fx.Node]) -> bool:
    return base[node] is node and not overwritten.isdisjoint((node, base[operand(node, 0)]))


def _to_linear(nodes: fx.Graph, node: fx.Node) -> None:
    bias, x, weight = None, operand(node, 0), operand(node, 1)
    if node.target is aten.addmm.default:
        if node.kwargs.get("alpha", 1) != 1 or node.kwargs.get("beta", 1) != 1:
            return
        bias, x, weight = operand(node, 0), operand(node, 1), operand(node, 2)
        if not isinstance(bias, fx.Node) or len(shape(bias)) != 1 or bias.op != "get_attr":
            return
    if not isinstance(x, fx.Node) or not isinstance(weight, fx.Node) or len(shape(x)) < 2:
        return
    if len(shape(x)) == 3 and weight_behind(weight, 3) is not None and shape(x)[0] == shape(weight)[0]:
        node.target = aten.bmm.default
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
    """``weight`` (..., K, N) as the (..., N, K) that linears take."""
    last = len(shape(weight)) - 1
    node = nodes.call_function(aten.permute.default, (weight, [*range(last - 1), last, last - 1]))
    node.meta["val"] = weight.meta["val"].mT
    return node


def _is_grouped(node: fx.Node) -> bool:
    """Whether ``node`` multiplies rows sorted by expert with a stack of weights ``(E, K, N)``."""
    if node.target is aten._grouped_mm.default:
        extras = [operand(node, 3, "bias"), operand(node, 4, "out_dtype")]
        operands = (operand(node, 0), operand(node, 1), operand(node, 2, "offs"))
        if extras != [None, None] or not all(isinstance(n, fx.Node) for n in operands):
            return False
        return [len(shape(n)) for n in operands] == [2, 3, 1]
    # Holds the same place where the library's own op does not run; known by name, since it is only there
    # once the library that registers it is imported.
    return str(node.target) == "transformers.grouped_mm_fallback.default"


def _to_grouped_linear(nodes: fx.Graph, node: fx.Node) -> None:
    x, weight, offsets = operand(node, 0), operand(node, 1), operand(node, 2, "offs")
    with nodes.inserting_before(node):
        stored = operand(weight, 0) if is_transpose(weight) else _transpose(nodes, weight)
        new = nodes.call_function(GROUPED_LINEAR, (x, stored, offsets))
    new.meta = dict(node.meta)
    node.replace_all_uses_with(new)
    nodes.erase_node(node)


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
        if not isinstance(node.meta["val"], torch.Tensor) or any(map(written, (node, *node.users))):
            continue
        weight_only.add(node)
        key = (node.target, str(node.args), str(node.kwargs), dtype(node))
        if key in seen:
            node.replace_all_uses_with(seen[key])
            graph.fx.erase_node(node)
        else:
            seen[key] = node
