"""Checks that hold a pass to its promise of an equal function, by running the graph before and after."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from awqc.capture import relative_error
from awqc.errors import VerifyError
from awqc.graph import Graph
from awqc.observers.activations import Activations
from awqc.observers.stages import Stage
from awqc.program import Env
from awqc.views import linear

#: Tokens on which the outputs of a stage's linears are compared.
CHECKED_ROWS = 64


@dataclass(frozen=True)
class Probe:
    """The model's forward captured at a small shape, with an input: what checks of whole graphs run.

    A graph is a program for one shape. Two captures of one model at different shapes are the same program
    but for the numbers in it, so what is shown of the small one need not be paid for on the large one.
    """

    graph: Graph
    batch: Mapping[str, Tensor]

    def mirrors(self, graph: Graph) -> bool:
        """Whether ``graph`` is this program at another shape: the same ops on the same operands."""
        mine, others = self.graph.nodes, graph.nodes
        return len(mine) == len(others) and all(
            a.op == b.op
            and a.name == b.name
            and a.target == b.target
            and [n.name for n in a.all_input_nodes] == [n.name for n in b.all_input_nodes]
            for a, b in zip(mine, others, strict=True)
        )


def check_equal(name: str, before: Graph, after: Graph, batch: Mapping[str, Tensor]) -> None:
    """Run both graphs on ``batch`` and compare all outputs.

    Raises:
        VerifyError: naming the pass ``name``, the output and the size of the error.
    """
    bound = _bound(before)
    results = [graph.run(batch, graph.weights.for_checks()) for graph in (after, before)]
    for i, (found, expected) in enumerate(zip(*results, strict=True)):
        error = relative_error(found, expected)
        if not error <= bound:
            raise VerifyError(
                f"pass {name!r} promises an equal function but changed output {i} of the graph by "
                f"{error:.1e} (relative; rounding explains {bound:.1e})"
            )


@dataclass
class StageCheck:
    """Compares what a stage's linears, and every other reader of its scaled tensors, compute.

    Only nodes that a fold can reach are run, on the first sample: from the first value that a group of
    the stage divides to the first values that must no longer notice.
    """

    graph: Graph
    stage: Stage
    activations: Activations
    _wanted: list[fx.Node] = field(default_factory=list)
    _expected: Env = field(default_factory=dict)
    _version: int = -1

    def __post_init__(self) -> None:
        # Everything that the stage's groups scale. What weights alone determine, and lists of tensors of
        # which a group scales some, are looked through: their readers are what must not notice.
        scaled = {n for g in self.stage.groups for n in g.values}
        pending = list(scaled)
        for reader in (reader for node in pending for reader in node.users if reader not in scaled):
            if reader in self.activations.weight_only or not isinstance(reader.meta.get("val"), Tensor):
                scaled.add(reader)
                pending.append(reader)
        frontier = {u for n in scaled for u in n.users if u not in scaled and u.op == "call_function"}
        frontier |= {view.node for view in self.stage.linears}
        # Taken now: when the tokens have moved on, what the stage started from is gone. Readers that ran
        # before the stage are to be run again, so their values are not taken.
        there = {**self.activations.history, **self.activations.samples[0]}
        self._known = {n: v for n, v in there.items() if n not in scaled | frontier}
        self._wanted = sorted(frontier, key=self.graph.order().__getitem__)

    def before(self) -> None:
        """Run, unless no weight changed since the last run."""
        if self._version != self.graph.weights.version:
            self._expected, self._version = self._run(), self.graph.weights.version

    def after(self, name: str) -> None:
        """Run again and compare.

        Raises:
            VerifyError: naming the pass, the tensor and the size of the error.
        """
        if self._version == self.graph.weights.version:
            return
        found, bound = self._run(), _bound(self.graph) + self._stored_rounding()
        for node in self._wanted:
            error = relative_error(found[node], self._expected[node])
            if not error <= bound:
                raise VerifyError(
                    f"pass {name!r} promises an equal function but changed tensor {node.name!r} by "
                    f"{error:.1e} (relative; rounding explains {bound:.1e}); leave it out with "
                    f"AWQC_SKIP={name} to go on"
                )
        self._expected, self._version = found, self.graph.weights.version

    def _run(self) -> Env:
        """Values of the wanted nodes; of a linear, its outputs for some of its input rows."""
        views = {node: view for node in self._wanted if (view := linear(node)) is not None}
        needed = {views[node].x if node in views else node for node in self._wanted}
        values = self.activations.evaluate(needed, self._known)
        weights = self.graph.weights
        for node, view in views.items():
            x = values[view.x].flatten(0, -2)[:CHECKED_ROWS]
            bias = None if view.bias is None else weights[str(view.bias.target)]
            values[node] = F.linear(x, view.weight(weights[view.parameter]), bias)
        # What lies before the stage was read to see what a fold does there; it is as large as the stage.
        weights.release(view.parameter for o in self.stage.observers for view in o.views)
        return {node: values[node] for node in self._wanted}

    def _stored_rounding(self) -> float:
        """A producer that is already quantized rounds its folded scales to half precision."""
        producers = [p for g in self.stage.groups for p in g.producers]
        rounded = any(self.graph.weights.scheme(p.parameter) is not None for p in producers)
        return 2.0**-10 if rounded else 0.0


def _bound(graph: Graph) -> float:
    dtype = graph.weights.dtype or torch.float32
    return 64 * len(graph.nodes) ** 0.5 * torch.finfo(dtype).eps
