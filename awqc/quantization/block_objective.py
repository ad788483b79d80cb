"""The loss of a candidate measured where peers measure it: at the output of the block it feeds.

The exact loss of :mod:`awqc.quantization.loss` stops at the linear's own output. This one runs the graph
on, through the nonlinearity where the group's outputs meet (the softmax of attention, the gate of an MLP) and
through the linear behind it, and compares there. It needs tokens, not just a Gram matrix, so it sees a few
samples.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, fx

from awqc.graph import Graph
from awqc.observers.activations import Activations
from awqc.views import ExpertLinear, Linear, expert_linear, linear
from awqc.weights import Weights


def meeting_point(graph: Graph, readers: list[Linear | ExpertLinear]) -> fx.Node:
    """Output of the first linear behind the node through which everything computed by ``readers`` passes."""
    affected = {view.node for view in readers}
    order = graph.order()
    last = max(order[view.node] for view in readers)
    met = False
    for node in graph.nodes:
        if node.op != "call_function" or not any(operand in affected for operand in node.all_input_nodes):
            continue
        affected.add(node)
        position = order[node]
        if met and (linear(node) or expert_linear(node)):
            return node
        live = [n for n in affected if order[n] <= position and any(order[u] > position for u in n.users)]
        met = met or (position > last and live == [node])
    return max(affected, key=order.__getitem__)


class BlockObjective:
    """Mean squared change of a block's output over a few samples.

    Args:
        graph: the graph with its current weights.
        activations: the calibration samples, at the start of the stage.
        readers: the group's quantized linears.
        samples: how many samples to look at.
    """

    def __init__(
        self, graph: Graph, activations: Activations, readers: list[Linear | ExpertLinear], samples: int = 4
    ) -> None:
        self._activations = activations
        self._weights = graph.weights
        self._target = meeting_point(graph, readers)
        self._samples = [activations.samples[i] for i in range(min(samples, len(activations.samples)))]
        self._expected = [self._run(sample, graph.weights) for sample in self._samples]

    def loss(self, replaced: Mapping[str, Tensor]) -> float:
        """The loss with parameters ``replaced`` by name."""
        weights = self._weights.like(self._weights.dtype)
        for name, value in replaced.items():
            weights[name] = value
        total = 0.0
        for sample, expected in zip(self._samples, self._expected, strict=True):
            total += float((self._run(sample, weights) - expected).square().mean())
        return total

    def _run(self, sample: dict[fx.Node, Tensor], weights: Weights) -> Tensor:
        value: Tensor = self._activations.evaluate([self._target], sample, weights)[self._target]
        return value
