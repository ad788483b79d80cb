"""Take run-time scales back where they are of no use: still one, or in front of a linear that stays in float.

aten.linear(x * r, W, b)  ->  aten.linear(x, W diag(r), b)      r = 1, or W not rounded
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from awqc.context import Context
from awqc.graph import Graph
from awqc.pipeline import Pass
from awqc.report import Report
from awqc.runtime.input_scales import InputScales, input_scale
from awqc.views import Linear, linears


@dataclass(frozen=True)
class DropUnitScales(Pass):
    """The report says of each linear whether its input is scaled at run time, and why that is needed."""

    name: ClassVar[str] = "drop-unit-scales"
    requires: ClassVar[tuple[type, ...]] = (InputScales,)

    def run(self, graph: Graph, context: Context) -> None:
        reasons = graph.facts[InputScales]
        for view in list(linears(graph)):
            found = input_scale(view.x)
            if found is None or view.parameter not in reasons:
                continue
            x, scale = found
            values, why = graph.weights[str(scale.target)], reasons[view.parameter]
            rounded = graph.weights.scheme(view.parameter) is not None
            if rounded and not bool((values == 1).all()):
                context.report.linears[view.parameter].no_group = why
                continue
            if not rounded:
                _fold_back(graph, view, values)
            view.node.update_arg(0, x)
            _ungrouped(context.report, view, why)
            graph.changed()
        graph.fx.eliminate_dead_code()


def _fold_back(graph: Graph, view: Linear, values: torch.Tensor) -> None:
    weight = graph.weights[view.parameter]
    graph.weights[view.parameter] = weight * (values[:, None] if view.transposed else values)


def _ungrouped(report: Report, view: Linear, why: str) -> None:
    row = report.linears.get(view.parameter)
    if row is None or row.group is None:
        return
    group = report.groups[row.group]
    group.linears.remove(row.name)
    if not group.linears:
        del report.groups[row.group]
    row.group, row.no_group = None, why
