"""``awqc.QLinear`` and ``awqc.QExperts`` nodes of a traced graph -> operators that runtimes have."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import onnx_ir as ir
import torch
from torch import Tensor

from awqc.export.linears import Form, GraphWriter, Linear
from awqc.export.program import DOMAIN, QEXPERTS
from awqc.quantized import QuantizedWeight, Scheme


@dataclass(frozen=True)
class Lowered:
    """What became of the quantized linears of a graph, by module name; those of experts count as one each.

    Args:
        forms: names of the operators.
        refused: reasons why the preferred form could not take a linear.
    """

    forms: dict[str, str]
    refused: dict[str, str]


def lower(model: ir.Model, form: Form, fallback: Form) -> Lowered:
    """Write every quantized linear of ``model`` in ``form``, or in ``fallback`` where that refuses.

    Args:
        model: from :func:`awqc.export.program.trace`; changed in place.
        form: the preferred one.
        fallback: refuses nothing.
    """
    lowered = Lowered({}, {})
    for node in list(model.graph.all_nodes()):
        if node.domain != DOMAIN:
            continue
        path = (node.name or "").rpartition("/")[0]
        # Not from the names of the weights: equal ones of several linears are one.
        name = path.strip("/").replace("/", ".")
        linear, offsets = _read(node, name)
        reason = form.refuses(linear.weight)
        if reason is not None:
            lowered.refused[name] = reason
        chosen = form if reason is None else fallback
        lowered.forms[name] = chosen.name
        writer = GraphWriter(model, path)
        if node.op_type == QEXPERTS:
            y = _experts(writer, chosen, linear, offsets)
        else:
            y = _linear(writer, chosen, linear)
        _replace(model.graph, node, y, writer.nodes)
    model.opset_imports.pop(DOMAIN, None)
    return lowered


def _read(node: ir.Node, name: str) -> tuple[Linear, ir.Value | None]:
    """The linear of ``node``, or of all experts, and the offsets."""
    absent: list[ir.Value | None] = [None] * (6 - len(node.inputs))
    x, codes, scales, zeros, bias, offsets = [*node.inputs, *absent]
    assert x is not None
    assert x.dtype is not None
    scheme = Scheme(node.attributes["bits"].as_int(), node.attributes["group_size"].as_int())
    weight = QuantizedWeight(_tensor(codes), _tensor(scales), _tensor(zeros), scheme)
    return Linear(name, weight, x, bias, x.dtype), offsets


def _tensor(value: ir.Value | None) -> Tensor:
    assert value is not None
    assert value.const_value is not None
    return torch.from_numpy(value.const_value.numpy())


def _linear(graph: GraphWriter, form: Form, linear: Linear) -> ir.Value:
    y = form.write(linear, graph)
    return y if linear.bias is None else graph.node("Add", [y, linear.bias])


def _experts(graph: GraphWriter, form: Form, stack: Linear, offsets: ir.Value | None) -> ir.Value:
    """One linear for each expert, on its share of the rows; then all rows again."""
    weight, outputs = stack.weight, []
    first = graph.constant([0])
    ends = None if offsets is None else graph.node("Cast", [offsets], to=ir.DataType.INT64.value)
    start = first
    for e in range(len(weight.codes)):
        if ends is None:  # (E, T, K): as many rows for each
            end = graph.constant([e + 1])
        else:
            end = graph.node("Slice", [ends, graph.constant([e]), graph.constant([e + 1])])
        rows = graph.node("Slice", [stack.x, start, end, first])
        expert = replace(
            stack,
            name=f"{stack.name}.{e}",
            weight=replace(weight, codes=weight.codes[e], scales=weight.scales[e], zeros=weight.zeros[e]),
            x=rows,
        )
        outputs.append(form.write(expert, graph))
        start = end
    return graph.node("Concat", outputs, axis=0)


def _replace(graph: ir.Graph, node: ir.Node, y: ir.Value, nodes: Sequence[ir.Node]) -> None:
    old = node.outputs[0]
    y.shape, y.type = old.shape, old.type
    graph.insert_before(node, nodes)
    stored = [value for value in node.inputs if value is not None and value.is_initializer()]
    old.replace_all_uses_with(y, replace_graph_outputs=True)
    graph.remove(node, safe=True)
    if y.is_graph_output():
        y.name = old.name
    for value in stored:
        if not value.uses() and value.name is not None:
            del graph.initializers[value.name]
