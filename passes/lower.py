"""Lower every quantized linear to the op of a backend, on that backend's packed weights.

    awqc.qlinear(x, codes, scales, zeros, b, g)  ->  backend op(x, packed..., constants)

A backend that refuses a linear is replaced by the reference for it, and the report says so.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from awqc.backend import Backend
from awqc.context import Context
from awqc.graph import Graph
from awqc.lowered import LoweredLinears, QuantizedLinears
from awqc.lowering import lower_linear
from awqc.passes.quantize_linears import parameter
from awqc.pipeline import Pass
from awqc.runtime import QuantLinear
from awqc.views import QLinear


@dataclass(frozen=True)
class Lower(Pass):
    """Choose, pack and rewire.

    Args:
        backend: a name, ``"auto"``, or a backend object with its options.
    """

    name: ClassVar[str] = "lower"
    requires: ClassVar[tuple[type, ...]] = (QuantizedLinears,)
    provides: ClassVar[tuple[type, ...]] = (LoweredLinears,)
    consumes: ClassVar[tuple[type, ...]] = (QuantizedLinears,)
    output: ClassVar = "lossy"

    backend: str | Backend = "auto"

    def run(self, graph: Graph, context: Context) -> None:
        weights, found = graph.facts[QuantizedLinears], LoweredLinears()
        rows = {row.name: row for row in context.report.linears.values()}
        for node in graph.nodes:
            if node.target is not torch.ops.awqc.qlinear.default:
                continue
            view = QLinear(node)
            name, bias = view.name, view.bias
            if name not in found:
                lowered = lower_linear(
                    weights[name],
                    None if bias is None else graph.weights[str(bias.target)],
                    node.meta["val"].dtype,
                    graph.weights.device,
                    self.backend,
                )
                found[name] = QuantLinear(lowered)
                rows[name].backend = lowered.backend.name
                rows[name].notes += lowered.packed.notes
                # With "auto" a refusal is the choice at work; of a backend that was named it is news.
                if self.backend != "auto":
                    rows[name].notes += [f"{other} refused: {why}" for other, why in lowered.refused.items()]
            _rewire(graph, view, found[name])
        graph.fx.eliminate_dead_code()
        graph.facts[LoweredLinears] = found
        graph.changed()


def _rewire(graph: Graph, view: QLinear, linear: QuantLinear) -> None:
    there, node = graph.parameters(), view.node
    operands: list[fx.Node | None] = []
    for part, tensor in linear.operands().items():
        full = f"{view.name}.{part}"
        if tensor is None:
            operands.append(None)
        else:
            operands.append(there.get(full) or parameter(graph, full, tensor, before=node))
    with graph.fx.inserting_before(node):
        new = graph.fx.call_function(linear.op, (view.x, *operands, *linear.constants))
    new.meta = dict(node.meta)
    node.replace_all_uses_with(new)
    graph.fx.erase_node(node)
