"""What values of a graph depend on."""

from __future__ import annotations

from torch import fx

from awqc.graph import Graph
from awqc.scaleflow.groups import ScaleGroups
from awqc.views import expert_linears, linears


def weight_only(graph: Graph) -> set[fx.Node]:
    """Nodes that depend on parameters that passes may change, and on no input."""
    changeable = {view.parameter for view in linears(graph)}
    changeable |= {view.parameter for view in expert_linears(graph)}
    if ScaleGroups in graph.facts:
        changeable |= {part.parameter for group in graph.facts[ScaleGroups] for part in group.parts}
    on_inputs = dependent_on(graph, lambda n: n.op == "placeholder")
    on_weights = dependent_on(graph, lambda n: n.op == "get_attr" and str(n.target) in changeable)
    return {n for n in on_weights - on_inputs if n.op == "call_function"}


def dependent_on(graph: Graph, source: object) -> set[fx.Node]:
    """All nodes for which ``source(node)`` holds, and everything computed from them."""
    assert callable(source)
    found: set[fx.Node] = set()
    for node in graph.fx.nodes:
        if source(node) or any(operand in found for operand in node.all_input_nodes):
            found.add(node)
    return found
