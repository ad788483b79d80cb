"""The graph: ATen ops over named parameters, and the facts that passes have established."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, fx

from awqc.errors import VerifyError
from awqc.program import Env, execute
from awqc.weights import Weights

F = TypeVar("F")


class Facts:
    """What passes know about a graph, one value per type (``facts[ScaleGroups]``)."""

    def __init__(self) -> None:
        self._facts: dict[type, Any] = {}

    def __getitem__(self, kind: type[F]) -> F:
        return self._facts[kind]

    def __setitem__(self, kind: type[F], value: F) -> None:
        self._facts[kind] = value

    def __contains__(self, kind: type) -> bool:
        return kind in self._facts

    def get(self, kind: type[F]) -> F | None:
        """The fact of this type, or None."""
        return self._facts.get(kind)

    def drop(self, kind: type) -> None:
        """Forget the fact of this type, if there is one."""
        self._facts.pop(kind, None)

    def kinds(self) -> set[type]:
        """The types of all facts."""
        return set(self._facts)


class Graph:
    """A model's forward as a torch.fx graph of ATen ops.

    Parameters and buffers are ``get_attr`` nodes whose target is the parameter's name in the model, one
    node per storage; user inputs are placeholders. Every node carries ``meta["val"]``, a fake tensor with
    its shape and dtype.

    Args:
        nodes: the fx graph.
        weights: what the names stand for.
        outputs: names of the model's outputs in the order of the output node.
    """

    def __init__(self, nodes: fx.Graph, weights: Weights, outputs: Iterable[str] = ()) -> None:
        self.fx = nodes
        self.weights = weights
        self.outputs = list(outputs)
        self.facts = Facts()
        self.version = 0

    # -- looking ---------------------------------------------------------------------------------------

    @property
    def nodes(self) -> list[fx.Node]:
        """All nodes in execution order, as a list that a loop may change the graph behind."""
        return list(self.fx.nodes)

    @property
    def inputs(self) -> list[fx.Node]:
        """The placeholders, one per user input."""
        return [n for n in self.fx.nodes if n.op == "placeholder"]

    @property
    def output(self) -> fx.Node:
        """The output node."""
        return next(iter(reversed(self.fx.nodes)))

    def parameters(self) -> dict[str, fx.Node]:
        """``get_attr`` nodes by parameter name."""
        return {str(n.target): n for n in self.fx.nodes if n.op == "get_attr"}

    def order(self) -> dict[fx.Node, int]:
        """Position of every node in execution order."""
        return {n: i for i, n in enumerate(self.fx.nodes)}

    def text(self) -> str:
        """The graph as stable text: one line a node with name, op, operands, shape and dtype."""
        from awqc.text import graph_text

        return graph_text(self.fx)

    # -- changing --------------------------------------------------------------------------------------

    def changed(self) -> None:
        """Record that nodes were added, removed or rewired."""
        self.version += 1

    def verify(self) -> None:
        """Check the invariants that every pass must leave intact.

        Raises:
            VerifyError: naming the node and the invariant.
        """
        try:
            self.fx.lint()
        except (RuntimeError, ValueError, AssertionError) as error:
            raise VerifyError(f"the graph is malformed: {error}") from error
        seen: dict[str, fx.Node] = {}
        known = set(self.weights.names)
        for node in self.fx.nodes:
            if node.op == "get_attr":
                name = str(node.target)
                if name in seen:
                    raise VerifyError(f"parameter {name!r} appears as two nodes, {seen[name]} and {node}")
                if name not in known:
                    raise VerifyError(f"node {node} refers to {name!r}, which no weight is known for")
                seen[name] = node
            if node.op in ("get_attr", "call_function", "placeholder") and "val" not in node.meta:
                raise VerifyError(f"node {node} carries no shape: set meta['val'] where it is created")

    # -- running ---------------------------------------------------------------------------------------

    def run(self, inputs: Mapping[str, Tensor], weights: Weights | None = None) -> list[Any]:
        """Execute the whole graph on ``inputs`` by placeholder name; the outputs, flattened."""
        env: Env = {n: inputs[str(n.target)] for n in self.inputs}
        arguments: Any = self.output.args
        (results,) = arguments  # one node may be several outputs
        values = weights or self.weights
        execute(self.nodes, env, values, keep=results)
        return [values[str(n.target)] if n.op == "get_attr" else env[n] for n in results]

    def copy(self, dtype: torch.dtype | None = None) -> Graph:
        """The same nodes on scratch weights (in ``dtype``): changes to either do not reach the other."""
        nodes = fx.Graph()
        nodes.output(nodes.graph_copy(self.fx, {}))
        return Graph(nodes, self.weights.like(dtype or self.weights.dtype), self.outputs)

    def retyped(self, dtype: torch.dtype) -> Graph:
        """The same graph with every floating-point dtype argument replaced by ``dtype``, on scratch
        weights: how a float32 graph is checked in float64."""
        result = self.copy(dtype)
        for node in result.fx.nodes:
            node.args = _retype(node.args, dtype)
            node.kwargs = _retype(node.kwargs, dtype)
            if _makes_default(node):
                node.kwargs = {**node.kwargs, "dtype": dtype}
        return result


def _makes_default(node: fx.Node) -> bool:
    """Whether ``node`` makes a tensor from nothing, of whatever dtype is the default."""
    if node.all_input_nodes or not isinstance(node.target, torch._ops.OpOverload):
        return False
    takes = any(argument.name == "dtype" for argument in node.target._schema.arguments)
    made = node.meta["val"]
    floating = isinstance(made, Tensor) and made.is_floating_point()
    return takes and floating and node.kwargs.get("dtype") is None


def _retype(value: Any, dtype: torch.dtype) -> Any:
    def one(item: Any) -> Any:
        return dtype if isinstance(item, torch.dtype) and item.is_floating_point else item

    return fx.node.map_aggregate(value, one)
