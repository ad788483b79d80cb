"""Lower every quantized linear to the op of a backend, on that backend's packed weights.

    awqc.qlinear(x, codes, scales, zeros, b, g)         ->  backend op(x, packed..., constants)
    awqc.qexperts(x, offsets, codes, scales, zeros, g)  ->  backend op(x, offsets, packed..., constants)

A backend that refuses a linear is replaced by the reference for it, and the report says so.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import fx

from awqc.backend import Backend, LinearShape
from awqc.context import Context
from awqc.graph import Graph
from awqc.passes.quantize_linears import parameter
from awqc.pipeline import Pass
from awqc.report import LinearRow
from awqc.runtime.experts import QuantExperts
from awqc.runtime.input_scales import input_scale
from awqc.runtime.linear import QuantLinear
from awqc.runtime.lowered import LoweredExperts, LoweredLinears, QuantizedLinears
from awqc.runtime.lowering import Lowered, lower_linear
from awqc.runtime.packed import PackedModule
from awqc.views import QExperts, QLinear


@dataclass(frozen=True)
class Lower(Pass):
    """Choose, pack and rewire.

    Args:
        backend: a name, ``"auto"``, or a backend object with its options.
        pack: False where the result goes to disk: of every shape one linear is packed, to know what will run
            it and what that needs; the lowered graph then names tensors without values.
        device: where linears will run; where the weights are unless given.
    """

    name: ClassVar[str] = "lower"
    requires: ClassVar[tuple[type, ...]] = (QuantizedLinears,)
    provides: ClassVar[tuple[type, ...]] = (LoweredLinears, LoweredExperts)
    consumes: ClassVar[tuple[type, ...]] = (QuantizedLinears,)
    output: ClassVar = "lossy"

    backend: str | Backend = "auto"
    pack: bool = True
    device: torch.device | None = None

    def run(self, graph: Graph, context: Context) -> None:
        linears, stacks = LoweredLinears(), LoweredExperts()
        rows = {row.name: row for row in context.report.linears.values()}
        seen: dict[tuple[LinearShape, bool], Lowered] = {}
        done: dict[str, PackedModule] = {}
        for node in graph.nodes:
            if node.target is torch.ops.awqc.qlinear.default:
                view = QLinear(node)
                if view.name not in done:
                    scaled = input_scale(view.x)
                    scale = None if scaled is None else graph.weights[str(scaled[1].target)]
                    lowered = self._lower(graph, view, rows[view.name], seen)
                    done[view.name] = linears[view.name] = QuantLinear(lowered, scale)
                self._rewire(graph, view, done[view.name])
            elif node.target is torch.ops.awqc.qexperts.default:
                stack = QExperts(node)
                name = stack.name
                if name not in done:
                    rounded = graph.weights.rounded(name) if self.pack else None
                    lowered = self._lower(graph, stack, context.report.linears[name], seen)
                    done[name] = stacks[name] = QuantExperts(
                        lowered, rounded is not None and rounded.transposed
                    )
                self._rewire(graph, stack, done[name])
        graph.fx.eliminate_dead_code()
        graph.facts[LoweredLinears], graph.facts[LoweredExperts] = linears, stacks
        context.report.sizes["linears_resident"] = sum(t.nbytes for m in done.values() for t in m.buffers())
        graph.changed()

    def _lower(
        self,
        graph: Graph,
        view: QLinear | QExperts,
        row: LinearRow,
        seen: dict[tuple[LinearShape, bool], Lowered],
    ) -> Lowered:
        shape = self._shape(graph, view)
        key = shape, view.bias is None
        lowered = seen.get(key)
        if lowered is None:
            lowered = lower_linear(
                graph.facts[QuantizedLinears][view.name],
                None if view.bias is None else graph.weights[str(view.bias.target)],
                shape.dtype,
                shape.device,
                self.backend,
            )
            if not self.pack:
                seen[key] = lowered = _without_values(lowered)
        row.backend = lowered.backend.name
        row.notes += lowered.packed.notes
        # With "auto" a refusal is the choice at work; of a backend that was named it is news.
        if self.backend != "auto":
            row.notes += [f"{other} refused: {why}" for other, why in lowered.refused.items()]
        return lowered

    def _shape(self, graph: Graph, view: QLinear | QExperts) -> LinearShape:
        scheme = graph.weights.scheme(graph.facts[QuantizedLinears].parameters[view.name])
        assert scheme is not None
        *count, n, k = view.codes_shape
        dtype = view.node.meta["val"].dtype
        device = self.device or graph.weights.device
        return LinearShape(n, k, scheme, dtype, device, count[0] if count else None)

    def _rewire(self, graph: Graph, view: QLinear | QExperts, linear: PackedModule) -> None:
        there, node = graph.parameters(), view.node
        operands: list[fx.Node | None] = []
        for part, tensor in linear.operands().items():
            full = f"{view.name}.{part}"
            if tensor is None:
                operands.append(None)
            else:
                operands.append(there.get(full) or parameter(graph, full, tensor, before=node))
        with graph.fx.inserting_before(node):
            new = graph.fx.call_function(linear.op, (*view.inputs, *operands, *linear.constants))
        new.meta = dict(node.meta)
        node.replace_all_uses_with(new)
        graph.fx.erase_node(node)


def _without_values(lowered: Lowered) -> Lowered:
    packed = lowered.packed
    tensors = {name: None if t is None else t.to("meta") for name, t in packed.tensors.items()}
    kept = {name: t.to("meta") for name, t in packed.kept.items()}
    return replace(lowered, packed=replace(packed, tensors=tensors, kept=kept))
