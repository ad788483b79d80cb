"""Observe the inputs of a stage's linears over every calibration token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from awqc.activations import Activations
from awqc.context import Context
from awqc.graph import Graph
from awqc.loss import GATE_ROWS, output_loss
from awqc.pipeline import Pass
from awqc.quantized import minmax_grid, sample_rows
from awqc.schemes import Schemes
from awqc.stages import Observers, Stages
from awqc.statistics import Statistics


@dataclass(frozen=True)
class Calibrate(Pass):
    """Gram matrix and mean magnitude of each activation that the stage's linears read."""

    name: ClassVar[str] = "calibrate"
    scope: ClassVar = "stage"
    requires: ClassVar[tuple[type, ...]] = (Observers, Stages, Schemes)
    provides: ClassVar[tuple[type, ...]] = (Statistics,)

    def run(self, graph: Graph, context: Context) -> None:
        assert context.stage is not None
        statistics = graph.facts[Activations].observe(context.stage)
        graph.facts[Statistics] = statistics
        schemes = graph.facts[Schemes]
        for observer in context.stage.observers:
            found = statistics[observer.node]
            if observer.group is not None:
                group = context.report.groups[observer.group.name]
                group.tokens, group.held_out_tokens = found.tokens, found.held_out_tokens
            for view in observer.linears:
                if view.parameter not in schemes:
                    continue
                # The yardstick of everything that follows: round-to-nearest, before anything is changed.
                weight = sample_rows(view.weight(graph.weights[view.parameter]).float(), GATE_ROWS)
                error = minmax_grid(weight, schemes[view.parameter]).nearest(weight) - weight
                row = context.report.linears[view.parameter]
                row.energy = float(output_loss(weight, found.held_out))
                row.nearest_error = float(output_loss(error, found.held_out)) / (row.energy or 1.0)
