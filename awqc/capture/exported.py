"""What ``torch.export`` traced, as a graph over the model's parameters."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export.graph_signature import OutputKind
from torch.utils._pytree import tree_flatten

from awqc.capture.builder import Builder
from awqc.capture.traced_regions import call_of, index_of
from awqc.errors import CaptureError
from awqc.functional import functionalize
from awqc.graph import Graph
from awqc.views import BUFFER, CONSTANT, PARAMETER

aten = torch.ops.aten

#: What a trace checks of values: the run that it is compared with has checked it too.
_CHECKS = {
    aten._assert_scalar.default,
    aten._assert_async.msg,
    aten.sym_constrain_range.default,
    aten.sym_constrain_range_for_size.default,
}


def graph_of_program(
    program: torch.export.ExportedProgram,
    module: nn.Module,
    builder: Builder,
    path: str = "",
    constants: Mapping[str, Tensor] | None = None,
) -> tuple[Graph, list[Any]]:
    """The exported program with parameters as ``get_attr`` nodes under their names in the model.

    Args:
        program: exported from ``module``.
        module: the model or a submodule of it.
        builder: an empty one.
        path: of ``module`` in the model; its constants are called after it.
        constants: values of inputs that are to be no inputs of the graph, by name.

    Returns:
        The graph, and the leaves of the module's result in order: nodes, and what is no tensor as it is.

    Raises:
        CaptureError: if the program has shapes that depend on values, writes into what it is given, or holds
            a region that cannot be looked into.
    """
    signature = program.graph_signature
    targets = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    lifted = dict(signature.inputs_to_lifted_tensor_constants)
    tensors: dict[str, Tensor] = dict(module.named_parameters(remove_duplicate=False))
    tensors |= dict(module.named_buffers(remove_duplicate=False))
    env: dict[fx.Node, Any] = {}
    leaves: list[Any] = []
    for node in program.graph.nodes:
        if node.op == "placeholder":
            target = targets.get(node.name) or lifted.get(node.name)
            like = node.meta.get("val")
            if target is None:
                if isinstance(like, Tensor):
                    given = (constants or {}).get(node.name)
                    if given is None:
                        env[node] = builder.input(node.name, like)
                    else:
                        env[node] = builder.constant(node.name, given, like)
            elif not node.users:
                continue
            elif target in tensors:
                role = PARAMETER if node.name in signature.inputs_to_parameters else BUFFER
                role = CONSTANT if node.name in lifted else role
                env[node] = builder.attribute(builder.names[id(tensors[target])], like, role)
            else:
                name = f"{path}.{target}" if path else target
                env[node] = builder.constant(name, program.constants[target], like)
        elif node.op == "output":
            leaves = _leaves(program, node, env)
        elif node.op == "get_attr":
            region = next(iter(node.users))
            raise CaptureError(
                f"the forward holds a region that awqc does not look into: {region.target} ({region.name}); "
                "remove torch.autocast and the like from the forward"
            )
        elif node.target not in _CHECKS:
            region_call = call_of(node)
            if region_call is not None:
                operands = [env[n] for n in node.all_input_nodes]
                env[node] = builder.region(region_call, operands, node.meta["val"])
            elif node.all_input_nodes and isinstance(env.get(node.all_input_nodes[0]), list):
                env[node] = env[node.all_input_nodes[0]][index_of(node)]
            else:
                env[node] = builder.copy(node, env)
    graph = builder.graph([leaf for leaf in leaves if isinstance(leaf, fx.Node)])
    for node in graph.nodes:
        _check_static(node)
    functionalize(graph)
    return graph, leaves


def _leaves(program: torch.export.ExportedProgram, node: fx.Node, env: Mapping[fx.Node, Any]) -> list[Any]:
    """The result's leaves; what the program says it has written elsewhere comes before them and is not
    one of them."""
    (results,) = node.args
    kinds = [spec.kind for spec in program.graph_signature.output_specs]
    flat = list(results) if isinstance(results, (list, tuple)) else [results]
    found = [leaf for leaf, kind in zip(flat, kinds, strict=True) if kind is OutputKind.USER_OUTPUT]
    return [env[leaf] if isinstance(leaf, fx.Node) else leaf for leaf in found]


def _check_static(node: fx.Node) -> None:
    for value in tree_flatten(node.meta.get("val"))[0]:
        symbolic = isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)) or (
            isinstance(value, Tensor) and any(isinstance(size, torch.SymInt) for size in value.shape)
        )
        if symbolic:
            raise CaptureError(
                f"the result of {node.target} ({node.name}) depends on values of tensors, in number or shape"
            )
