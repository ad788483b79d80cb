"""In-place ops out of a graph: what a graph is run on must be there unchanged when it is run again.

``torch.export`` keeps ``relu_``, ``add_``, ``copy_`` as they are written in the forward. Where no other view
of what such an op writes is read afterwards, it is the out-of-place op. The others stay if they write into
a tensor that the graph itself has made; one that writes into a parameter, a buffer or an input is refused.
"""

from __future__ import annotations

import torch
from torch import fx
from torch.utils._pytree import tree_flatten

from awqc.errors import CaptureError
from awqc.graph import Graph
from awqc.views import dtype, operand

aten = torch.ops.aten


def functionalize(graph: Graph) -> None:
    """Replace in-place ops by out-of-place ones.

    Raises:
        CaptureError: if one would change a parameter, a buffer, a constant or an input of the graph.
    """
    order, base = graph.order(), bases(graph)
    for node in order:
        for tensor in written(node):
            views = [n for n in order if base[n] is base[tensor] and order[n] < order[node]]
            read_later = any(order[user] > order[node] for n in views if n is not tensor for user in n.users)
            functional = _functional(node)
            if functional is not None and not read_later:
                for user in [user for user in tensor.users if order[user] > order[node]]:
                    user.replace_input_with(tensor, node)
                node.target = functional
            elif base[tensor].op != "call_function":
                raise CaptureError(
                    f"the forward writes into {str(base[tensor].target)!r} through {node.target} "
                    f"({node.name}), which would change what the next call starts from: write into a copy"
                )


def written(node: fx.Node) -> list[fx.Node]:
    """The operands that ``node`` writes into."""
    if not isinstance(node.target, torch._ops.OpOverload) or not node.target._schema.is_mutable:
        return []
    arguments = node.target._schema.arguments
    found = [
        operand(node, i, a.name) for i, a in enumerate(arguments) if a.alias_info and a.alias_info.is_write
    ]
    return [tensor for tensor in found if isinstance(tensor, fx.Node)]


def rewrites(graph: Graph) -> dict[fx.Node, list[fx.Node]]:
    """Every tensor that ops of the graph write into -> those ops and all views of it: what it takes to have
    it as those ops leave it."""
    base = bases(graph)
    into = {base[tensor] for node in base for tensor in written(node)}
    found: dict[fx.Node, list[fx.Node]] = {tensor: [] for tensor in into}
    for node in base:
        if base[node] in into and base[node] is not node:
            found[base[node]].append(node)
        for tensor in written(node):
            if base[node] is not base[tensor]:
                found[base[tensor]].append(node)
    return found


def bases(graph: Graph) -> dict[fx.Node, fx.Node]:
    """Every node -> the node that its memory belongs to: itself, or what it is a view of."""
    base: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        base[node] = node
        if node.target is not aten.lift_fresh_copy.default:  # copies, though the fake tensors share memory
            for source in node.all_input_nodes:
                if _memory(source) & _memory(node):
                    base[node] = base[source]
    return base


def _memory(node: fx.Node) -> set[int]:
    tensors = [t for t in tree_flatten(node.meta.get("val"))[0] if isinstance(t, torch.Tensor)]
    return {t.untyped_storage()._cdata for t in tensors}


def _functional(node: fx.Node) -> torch._ops.OpOverload | None:
    """The op that computes what the in-place ``node`` writes, if there is one of the same dtype."""
    target = node.target
    if not isinstance(target, torch._ops.OpOverload) or written(node) != [operand(node, 0)]:
        return None
    name = target._schema.name.removeprefix("aten::")
    packet = getattr(aten, name.removesuffix("_"), None) if name.endswith("_") else None
    alike = all(dtype(n) == dtype(node) for n in node.all_input_nodes if dtype(n).is_floating_point)
    return getattr(packet, target._overloadname, None) if alike else None
