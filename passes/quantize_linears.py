"""Replace every rounded linear by the canonical quantized op.

aten.linear(x, W, b)                ->  awqc.qlinear(x, codes, scales, zeros, b, group_size)
awqc.grouped_linear(x, W, offsets)  ->  awqc.qexperts(x, offsets, codes, scales, zeros, group_size)
aten.bmm(x, W)                      ->  awqc.qexperts(x, None, codes, scales, zeros, group_size)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, fx

from awqc.context import Context
from awqc.graph import Graph
from awqc.kernels import qexperts as _qexperts  # noqa: F401  defines the ops
from awqc.pipeline import Pass
from awqc.quantized import Scheme
from awqc.runtime.lowered import QuantizedLinears
from awqc.views import ExpertLinear, Linear, expert_linears, linears
from awqc.weights import Field


@dataclass(frozen=True)
class QuantizeLinears(Pass):
    """From here on the graph holds codes, scales and zero points instead of weights."""

    name: ClassVar[str] = "quantize-linears"
    provides: ClassVar[tuple[type, ...]] = (QuantizedLinears,)
    output: ClassVar = "lossy"

    def run(self, graph: Graph, context: Context) -> None:
        found: dict[str, str] = {}
        views: list[Linear | ExpertLinear] = [*linears(graph)]
        views += expert_linears(graph)
        for view in views:
            scheme = graph.weights.scheme(view.parameter)
            if scheme is None:
                _kept_after_all(context, view)
                continue
            name = view.name if isinstance(view, Linear) else view.parameter
            codes, scales, zeros = _parts(graph, view, name, scheme)
            size = scheme.group_size
            with graph.fx.inserting_before(view.node):
                if isinstance(view, Linear):
                    node = graph.fx.call_function(
                        torch.ops.awqc.qlinear.default, (view.x, codes, scales, zeros, view.bias, size)
                    )
                else:
                    node = graph.fx.call_function(
                        torch.ops.awqc.qexperts.default, (view.x, view.offsets, codes, scales, zeros, size)
                    )
            node.meta = dict(view.node.meta)
            view.node.replace_all_uses_with(node)
            graph.fx.erase_node(view.node)
            found[name] = view.parameter
        graph.fx.eliminate_dead_code()
        graph.facts[QuantizedLinears] = QuantizedLinears(graph.weights, found)
        graph.changed()


def _kept_after_all(context: Context, view: Linear | ExpertLinear) -> None:
    """A linear that was to be quantized and that a pass took back, or for which there was none."""
    row = context.report.linears.get(view.parameter)
    if row is not None and row.decision == "quantized":
        row.decision, row.reason, row.scheme = "kept", "no pass rounded its weight", ""


def _parts(graph: Graph, view: Linear | ExpertLinear, name: str, scheme: Scheme) -> list[fx.Node]:
    """Nodes for the codes, scales and zero points of ``view``, which are not read for it."""
    rows = (view.count, view.out_features) if isinstance(view, ExpertLinear) else (view.out_features,)
    groups = scheme.groups(view.in_features)
    parts: dict[Field, tuple[int, torch.dtype]] = {
        "codes": (view.in_features, torch.uint8),
        "scales": (groups, torch.float16),
        "zeros": (groups, torch.uint8),
    }
    nodes = []
    for field, (width, dtype) in parts.items():
        graph.weights.add_part(f"{name}.{field}", view.parameter, field)
        like = torch.empty(*rows, width, dtype=dtype, device="meta")
        nodes.append(_attribute(graph, f"{name}.{field}", like, view.node))
    return nodes


def parameter(graph: Graph, name: str, value: Tensor, before: fx.Node) -> fx.Node:
    """A ``get_attr`` node for a new tensor of the graph."""
    if name not in graph.weights.names:
        graph.weights.names.append(name)
    graph.weights[name] = value
    return _attribute(graph, name, torch.empty_like(value, device="meta"), before)


def _attribute(graph: Graph, name: str, like: Tensor, before: fx.Node) -> fx.Node:
    with graph.fx.inserting_before(before):
        node = graph.fx.create_node("get_attr", name, name=name.replace(".", "_"))
    node.meta["val"] = like
    return node
