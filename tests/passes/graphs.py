"""Small modules as graphs, and a look at what passes leave behind."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from awqc.capture import capture
from awqc.config import QuantConfig
from awqc.context import Context
from awqc.graph import Graph
from awqc.passes.calibrate import Calibrate
from awqc.passes.canonicalize import Canonicalize
from awqc.passes.find_scale_groups import FindScaleGroups
from awqc.passes.fold_constants import FoldConstants
from awqc.passes.insert_observers import InsertObservers
from awqc.pipeline import Pass, Pipeline
from awqc.storage.source import from_module
from awqc.views import linears

#: Passes over the whole graph that come before calibration.
ANALYSIS: tuple[Pass, ...] = (Canonicalize(), FoldConstants(), FindScaleGroups(), InsertObservers())
OBSERVED: tuple[Pass, ...] = (*ANALYSIS, Calibrate())


@dataclass(frozen=True)
class Look(Pass):
    """Calls ``see(graph, context)`` in the middle of a pipeline, once for every stage."""

    name: ClassVar[str] = "look"
    scope: ClassVar = "stage"

    see: Callable[[Graph, Context], None]

    def run(self, graph: Graph, context: Context) -> None:
        self.see(graph, context)


class Mlp(nn.Module):
    """norm -> up -> relu -> down, with two scale groups: the norm for ``up``, ``up`` for ``down``."""

    def __init__(self, width: int = 32, hidden: int = 48, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.norm = nn.RMSNorm(width)
        self.up = nn.Linear(width, hidden)
        self.down = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        # The sum keeps ``down`` from being the linear that computes the output.
        return x + self.down(torch.relu(self.up(self.norm(x))))


def samples(count: int = 16, tokens: int = 8, width: int = 32, seed: int = 1) -> list[dict[str, Tensor]]:
    """Calibration batches ``x`` ``(1, tokens, width)`` whose channels are correlated."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(width, width, generator=generator) / width**0.5
    x = torch.randn(count, 1, tokens, width, generator=generator)
    return [{"x": row} for row in x + 3 * x @ mix]


def graph_of(module: nn.Module, **inputs: Tensor) -> Graph:
    return capture(from_module(module.eval()), inputs)


def context_of(batches: list[dict[str, Tensor]], **options: Any) -> Context:
    # float32 throughout: what tests compare with is computed so.
    return Context(QuantConfig(**{"group_size": 16, "propagate_dtype": "float32", **options}), batches)


def run(
    module: nn.Module, batches: list[dict[str, Tensor]], *passes: Pass, **options: Any
) -> tuple[Graph, Context]:
    """The graph of ``module`` after ``passes``, with all checks on."""
    graph, context = graph_of(module, **batches[0]), context_of(batches, **options)
    Pipeline(passes).run(graph, context)
    return graph, context


def ops(graph: Graph) -> list[str]:
    """Ops of the graph in execution order: ``aten.linear`` and the like."""
    return [str(n.target).removesuffix(".default") for n in graph.nodes if n.op == "call_function"]


def parameters(graph: Graph) -> list[str]:
    """Weight names of the graph's linears, in execution order."""
    return [view.parameter for view in linears(graph)]
