"""Readable names for an exported graph: module paths, as the model has them."""

from __future__ import annotations

import ast
import re
from collections import Counter
from collections.abc import Mapping, Sequence

import onnx_ir as ir

#: Where torch's exporter leaves the path of the module that a node comes from.
_SCOPES = "pkg.torch.onnx.name_scopes"


def rename(model: ir.Model, prefix: str, dimensions: Mapping[str, Mapping[int, str]]) -> None:
    """Name nodes after the module they come from, ``/layers.0/mlp/Mul``, and weights as the model does.

    The exporter's own remarks on each node, which hold file names of the machine it ran on, are dropped.

    Args:
        model: changed in place.
        prefix: attribute that holds the model in the module that was traced.
        dimensions: input name -> axis -> name of the dimension.
    """
    used: Counter[str] = Counter()
    for node in model.graph.all_nodes():
        scopes = ast.literal_eval(node.metadata_props.get(_SCOPES, "[]"))
        name = f"{module_path(scopes, prefix)}/{node.op_type}"
        node.name = name if not used[name] else f"{name}_{used[name]}"
        used[name] += 1
        node.metadata_props.clear()
        node.doc_string = None
    for name, value in list(model.graph.initializers.items()):
        if name.startswith(f"{prefix}."):
            value.name = name.removeprefix(f"{prefix}.")
    values = _values(model)
    _rename_dimensions(model.graph.inputs, values, dimensions)
    for properties in [model.metadata_props, model.graph.metadata_props, *(v.metadata_props for v in values)]:
        properties.clear()


def module_path(scopes: Sequence[str], prefix: str) -> str:
    """``/model/layers.0/mlp`` from the qualified names of the modules around a node, outermost first.

    Args:
        scopes: the first is that of the traced module, the last the node's own.
        prefix: of all module names, left out.
    """
    parts, outer = [], prefix
    for scope in scopes[:-1]:
        if scope.startswith(f"{outer}."):
            parts.append(scope.removeprefix(f"{outer}."))
            outer = scope
    return "".join(f"/{part}" for part in parts)


def _values(model: ir.Model) -> list[ir.Value]:
    graph = model.graph
    made = [value for node in graph.all_nodes() for value in node.outputs]
    return [*graph.inputs, *graph.initializers.values(), *made]


def _rename_dimensions(
    inputs: Sequence[ir.Value], values: Sequence[ir.Value], dimensions: Mapping[str, Mapping[int, str]]
) -> None:
    names: dict[str, str] = {}
    for value in inputs:
        for axis, name in dimensions.get(value.name or "", {}).items():
            size = value.shape[axis] if value.shape is not None else None
            if isinstance(size, ir.SymbolicDim) and size.value is not None:
                names.setdefault(size.value, name)

    def renamed(size: int | ir.SymbolicDim) -> int | ir.SymbolicDim:
        if isinstance(size, int) or size.value is None:
            return size
        # Sizes may be expressions: "s0 + s70".
        return ir.SymbolicDim(re.sub(r"\w+", lambda m: names.get(m[0], m[0]), size.value))

    for value in values:
        if value.shape is not None:
            value.shape = ir.Shape([renamed(size) for size in value.shape])
