"""The last rung that gives ops: a tape of what one run did, branches taken and all. For analysis only.

Nothing compiles from a tape: it is one path through a forward that has several. What it says is held to the
same comparison with eager execution on two inputs as any graph.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_flatten, tree_map_only

from awqc.capture.inputs import flat_inputs
from awqc.capture.subject import Subject
from awqc.capture.tracing import evaluation_mode, quick_tracing, reason
from awqc.errors import CaptureError
from awqc.functional import functionalize
from awqc.graph import Graph
from awqc.program import Env, execute
from awqc.storage.source import swapped_tensors
from awqc.views import BUFFER, PARAMETER


def tape(subject: Subject) -> Graph:
    """What one run of the root does, op by op.

    Raises:
        CaptureError: if the model has no weights to run, or its ops cannot be followed.
    """
    if not subject.source.has_values:
        raise CaptureError("the model has no weights to run")
    root, builder, arguments = subject.module, subject.builder(), subject.arguments()
    originals = list({id(t): t for t in (*root.parameters(), *root.buffers())}.values())
    values = [builder.weights[builder.names[id(t)]] for t in originals]
    traced = _traced(root, originals, values, arguments)
    env: dict[fx.Node, Any] = {}
    outputs: list[fx.Node] = []
    named = iter(flat_inputs(arguments))
    given = tree_flatten(list(arguments.values()))[0]
    slots = iter([*originals, *(next(named) if isinstance(x, Tensor) else None for x in given)])
    for node in traced.graph.nodes:
        if node.op == "placeholder":
            slot = next(slots)
            if slot is None:
                continue
            if isinstance(slot, str):
                env[node] = builder.input(slot, torch.empty(0))
            elif node.users:
                role = PARAMETER if isinstance(slot, nn.Parameter) else BUFFER
                env[node] = builder.attribute(builder.names[id(slot)], torch.empty(0), role)
        elif node.op == "get_attr":
            value = getattr(traced, str(node.target))
            env[node] = builder.constant(f"{subject.root}.{node.target}".lstrip("."), value, value)
        elif node.op == "output":
            outputs = [env[leaf] for leaf in tree_flatten(node.args)[0]]
        elif isinstance(node.target, torch._ops.OpOverload) or node.users:
            env[node] = builder.copy(node, env)
    graph = builder.graph(outputs)
    _set_shapes(graph, flat_inputs(arguments))
    functionalize(graph)
    return graph


def _traced(root: nn.Module, originals: list[Tensor], values: list[Tensor], arguments: Any) -> fx.GraphModule:
    names = list(arguments)

    def run(tensors: list[Tensor], given: list[Any]) -> list[Tensor]:
        swap = {id(t): value for t, value in zip(originals, tensors, strict=True)}
        with swapped_tensors(root, lambda tensor: swap[id(tensor)]):
            result = root(**dict(zip(names, given, strict=True)))
        return [leaf for leaf in tree_flatten(result)[0] if isinstance(leaf, Tensor)]

    given = tree_map_only(Tensor, torch.clone, list(arguments.values()))
    with evaluation_mode(root), torch.no_grad(), quick_tracing():
        try:
            # Values that the forward reads are those of this run: that is what makes it a tape.
            record = make_fx(run, tracing_mode="real", pre_dispatch=True, _error_on_data_dependent_ops=False)
            return record(values, given)
        except Exception as error:
            raise CaptureError(f"{type(root).__name__} cannot be taped: {reason(error)}") from error


def _set_shapes(graph: Graph, inputs: dict[str, Tensor]) -> None:
    """Run the tape and give every node a fake of what it computed; views share memory as they did."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    env: Env = {node: inputs[str(node.target)].clone() for node in graph.inputs}
    try:
        execute(graph.nodes, env, graph.weights)
    except Exception as error:
        raise CaptureError(f"the tape does not run again: {reason(error)}") from error
    env |= {node: graph.weights[name] for name, node in graph.parameters().items()}
    for node, value in env.items():
        node.meta["val"] = tree_map_only(Tensor, mode.from_tensor, value)
