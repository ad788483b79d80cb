"""What ``torch.export`` traced, as a graph over the model's parameters."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._higher_order_ops.wrap import wrap_with_autocast
from torch.export.graph_signature import OutputKind
from torch.utils._pytree import tree_flatten

from awqc.capture.builder import Builder
from awqc.capture.traced_regions import Unfollowed, call_of, index_of
from awqc.capture.wrapped import inline_modes
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
_SYMBOLS = (torch.SymInt, torch.SymFloat, torch.SymBool)


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
    inline_modes(program.graph_module)
    _check_followed(program.graph)
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
        else:
            region_call = call_of(node)
            if region_call is not None:
                operands = [env[n] for n in node.all_input_nodes]
                env[node] = builder.region(region_call, operands, node.meta["val"])
            elif node.all_input_nodes and isinstance(env.get(node.all_input_nodes[0]), list):
                env[node] = env[node.all_input_nodes[0]][index_of(node)]
            else:
                env[node] = builder.copy(node, env)
    graph = builder.graph([leaf for leaf in leaves if isinstance(leaf, fx.Node)])
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


def _check_followed(graph: fx.Graph) -> None:
    """Raise :class:`Unfollowed` where a traced graph holds what no graph of awqc can."""
    for node in reversed(graph.nodes):
        if node.target in _CHECKS and not node.users:
            graph.erase_node(node)
    graph.eliminate_dead_code()
    reasons = {node: why for node in graph.nodes if (why := _obstacle(node))}
    together: list[set[fx.Node]] = []
    for node in reasons:
        touched = [nodes for nodes in together if not nodes.isdisjoint(node.all_input_nodes)]
        together = [nodes for nodes in together if nodes not in touched] + [{node}.union(*touched)]
    if together:
        stacks = [_modules_of(node) for node in together[0]]
        shared = zip(*stacks, strict=False)
        stack = [names[0] for names in itertools.takewhile(lambda names: len(set(names)) == 1, shared)]
        raise Unfollowed(next(why for node, why in reasons.items() if node in together[0]), stack)


def _modules_of(node: fx.Node) -> list[str]:
    """Names of the modules whose forwards were running, outermost first."""
    stack = (node.meta.get("nn_module_stack") or {}).values()
    return [str(path).partition("@")[0] for path, _ in stack]


def _obstacle(node: fx.Node) -> str:
    """Why ``node`` cannot be followed; empty if it can."""
    if node.op == "get_attr":
        region = next(iter(node.users))
        hint = "; remove torch.autocast from the forward" if region.target is wrap_with_autocast else ""
        what = f"{region.target} ({region.name}){hint}"
        return f"the forward holds a region that awqc does not look into: {what}"
    for value in tree_flatten(node.meta.get("val"))[0]:
        if isinstance(value, Tensor) and torch._C._functorch.is_functorch_wrapped_tensor(value):
            return f"{node.target} ({node.name}) runs inside of a torch.func transform"
        if isinstance(value, _SYMBOLS) or (
            isinstance(value, Tensor) and any(isinstance(size, torch.SymInt) for size in value.shape)
        ):
            return (
                f"the result of {node.target} ({node.name}) depends on values of tensors, in number or shape"
            )
    return ""
