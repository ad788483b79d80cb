"""One graph out of several: the graphs of submodules, and regions in between."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from awqc.capture.regions import LinearInputs, Region, inner_linears
from awqc.errors import CaptureError
from awqc.graph import Graph
from awqc.storage.source import named_tensors
from awqc.views import BUFFER, CONSTANT, PARAMETER
from awqc.weights import Weights

aten = torch.ops.aten


class Builder:
    """Collects nodes.

    Args:
        weights: what names stand for.
        names: id of every parameter and buffer of the model -> its first name in the whole model.
    """

    def __init__(self, weights: Weights, names: dict[int, str]) -> None:
        self.weights = weights
        self.names = names
        self._nodes = fx.Graph()
        self._there: dict[str, fx.Node] = {}
        #: Linears whose inputs a region has given already.
        self._tapped: set[str] = set()

    def input(self, name: str, value: Tensor) -> fx.Node:
        """An input of the graph; ``value`` has its shape and dtype."""
        node = self._nodes.placeholder(name)
        node.meta = {"val": value}
        return node

    def attribute(self, name: str, value: Tensor, role: str) -> fx.Node:
        """The one node that reads ``name``; ``value`` has its shape and dtype."""
        if name not in self._there:
            node = self._nodes.create_node("get_attr", name, name=name.replace(".", "_"))
            node.meta = {"val": value, "role": role}
            self._there[name] = node
        return self._there[name]

    def constant(self, name: str, value: Any, like: Tensor) -> fx.Node:
        """A tensor that is written in the forward, or that a rung has made up.

        Raises:
            CaptureError: if it has no values.
        """
        add_constant(self.weights, name, value)
        return self.attribute(name, like, CONSTANT)

    def tensor(self, tensor: Tensor) -> fx.Node:
        """A parameter or buffer of the model."""
        dtype = self.weights.dtype if tensor.is_floating_point() else None
        like = torch.empty(tensor.shape, dtype=dtype or tensor.dtype, device="meta")
        role = PARAMETER if isinstance(tensor, nn.Parameter) else BUFFER
        return self.attribute(self.names[id(tensor)], like, role)

    def call(self, target: Any, operands: Sequence[Any], value: Any) -> fx.Node:
        """A call whose result is like ``value``."""
        node = self._nodes.call_function(target, tuple(operands))
        node.meta = {"val": value}
        return node

    def copy(self, node: fx.Node, env: dict[fx.Node, Any]) -> fx.Node:
        """A node of another graph, its operands looked up in ``env``."""
        new = self._nodes.node_copy(node, lambda n: env[n])
        new.meta = {"val": node.meta.get("val")}
        return new

    def splice(self, graph: Graph, operands: Sequence[fx.Node]) -> dict[fx.Node, fx.Node]:
        """Copy ``graph`` in, ``operands`` in the place of its inputs; which node became which."""
        env: dict[fx.Node, Any] = dict(zip(graph.inputs, operands, strict=True))
        for node in graph.nodes:
            if node.op == "get_attr":
                env[node] = self.attribute(str(node.target), node.meta["val"], node.meta["role"])
            elif node.op == "call_function":
                env[node] = self.copy(node, env)
        return env

    def region(self, call: Region, operands: Sequence[fx.Node], results: Sequence[Tensor]) -> list[fx.Node]:
        """Nodes of the results of a region; its linears, if it has any, right before it.

        Args:
            call: what is run.
            operands: nodes of its arguments, and of its answers.
            results: tensors like its results.
        """
        tensors = dict(named_tensors(call.module))
        count = call.arguments.tensors
        arguments = [
            *operands[:count],
            *(self.tensor(tensors[name]) for name in call.names),
            *operands[count:],
        ]
        before = [] if call.upto else self._linears(call, tensors, arguments)
        node = self.call(call, [*arguments, *before], [torch.empty_like(r, device="meta") for r in results])
        return [self.item(node, i) for i in range(len(results))]

    def item(self, node: fx.Node, index: int) -> fx.Node:
        """Element ``index`` of a list of tensors."""
        return self.call(operator.getitem, (node, index), node.meta["val"][index])

    def _linears(self, call: Region, tensors: dict[str, Tensor], arguments: list[fx.Node]) -> list[fx.Node]:
        """A linear node for each linear module of the region, on what it reads there.

        Nobody uses their results: the region computes them itself. They are operands of it so that their
        weights are rounded before the region is run.
        """
        found = [
            (weight, bias)
            for weight, bias in inner_linears(call.module)
            if weight in call.names and self.names[id(tensors[weight])] not in self._tapped
        ]
        if not found:
            return []
        self._tapped |= {self.names[id(tensors[weight])] for weight, _ in found}
        taps = LinearInputs(
            call.module,
            call.path,
            call.arguments,
            call.names,
            call.answers,
            weights=tuple(weight for weight, _ in found),
        )
        weights = [self.tensor(tensors[weight]) for weight, _ in found]
        rows = [w.meta["val"].new_empty(1, w.meta["val"].shape[1]) for w in weights]
        node = self.call(taps, arguments, rows)
        linears = []
        for i, ((_, bias), weight) in enumerate(zip(found, weights, strict=True)):
            operands = [self.item(node, i), weight, *([self.tensor(tensors[bias])] if bias else [])]
            linears.append(
                self.call(aten.linear.default, operands, rows[i].new_empty(1, len(weight.meta["val"])))
            )
        return linears

    def graph(self, outputs: Sequence[fx.Node]) -> Graph:
        """The finished graph."""
        self._nodes.output(tuple(outputs))
        graph = Graph(self._nodes, self.weights, [n.name for n in outputs])
        graph.fx.eliminate_dead_code()
        return graph


def add_constant(weights: Weights, name: str, value: Any) -> None:
    """Let ``name`` stand for ``value`` in ``weights``.

    Raises:
        CaptureError: if it has no values.
    """
    if not isinstance(value, Tensor) or isinstance(value, torch._subclasses.FakeTensor):
        raise CaptureError(
            f"the model holds {name!r}, a constant that depends on traced values: register it as a buffer"
        )
    if name not in weights.names:
        weights.names.append(name)
        weights[name] = value
