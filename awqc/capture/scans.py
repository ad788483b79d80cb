"""Forwards that loop over time: how long an input may be before their graph is too large.

A recurrence that is written as a loop is unrolled by a trace: the graph grows with the sequence. Whether a
graph does is seen from two lengths; that it might, from ops that read the steps of an axis one by one.
"""

from __future__ import annotations

from collections import defaultdict

import torch
from torch import fx

from awqc.graph import Graph
from awqc.views import operand, shape

aten = torch.ops.aten

#: Nodes of the largest graph that an unrolled loop is captured as.
LARGEST = 20_000


def reads_steps(graph: Graph, steps: int) -> bool:
    """Whether the graph takes an axis of length ``steps`` apart, as a loop over time does."""
    seen: dict[tuple[int, ...], set[int]] = defaultdict(set)
    for node in graph.nodes:
        if node.op != "call_function" or not node.all_input_nodes:
            continue
        source = node.all_input_nodes[0]
        if not isinstance(source.meta.get("val"), torch.Tensor):
            continue
        size = shape(source)
        if node.target is aten.select.int:
            dim, index = operand(node, 1), operand(node, 2)
        elif node.target is aten.slice.Tensor and shape(node) != size:
            dim, index = operand(node, 1, "dim", 0), operand(node, 2, "start", 0) or 0
            if shape(node)[dim] != 1:
                continue
        elif node.target in (aten.unbind.int, aten.split.Tensor):
            if len(node.meta["val"]) == steps:
                return True
            continue
        else:
            continue
        if isinstance(index, int) and not isinstance(dim, fx.Node) and size[dim] == steps:
            seen[(*size, dim)].add(index % steps)
    return any(len(indices) == steps for indices in seen.values())


def longest(few: tuple[int, int], more: tuple[int, int], wanted: int) -> int:
    """How many tokens a graph may have so as not to exceed :data:`LARGEST` nodes, at most ``wanted``.

    Args:
        few, more: (tokens, nodes) of two graphs.
    """
    slope = (more[1] - few[1]) / (more[0] - few[0])
    if slope <= 0 or few[1] + slope * (wanted - few[0]) <= LARGEST:
        return wanted
    return max(few[0], int(few[0] + (LARGEST - few[1]) / slope))
