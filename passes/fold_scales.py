"""Fold the chosen scales: ``W <- W diag(s)``, and whatever produces the input is divided by ``s``.

Equal by construction of the groups, and held to it: the linears' outputs on calibration tokens are
compared before and after. Values and statistics that were computed before the fold follow it exactly
(``x -> x / s``, ``H -> diag(1/s) H diag(1/s)``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from awqc.context import Context
from awqc.graph import Graph
from awqc.memory import FLOAT, Kind
from awqc.observers.activations import Activations
from awqc.observers.stages import Observer
from awqc.observers.statistics import Statistics
from awqc.pipeline import Pass
from awqc.quantization.scales import FoldedScales, Scales
from awqc.views import ExpertLinear
from awqc.work import Work, matrices_of, rows


@dataclass(frozen=True)
class FoldScales(Pass):
    """Apply the scales of the stage's groups to all their producers and consumers."""

    name: ClassVar[str] = "fold-scales"
    scope: ClassVar = "stage"
    requires: ClassVar[tuple[type, ...]] = (Scales, Statistics)
    provides: ClassVar[tuple[type, ...]] = (FoldedScales,)
    consumes: ClassVar[tuple[type, ...]] = (Scales,)

    def work(self, graph: Graph, observers: Sequence[Observer], samples: int, kind: Kind = "full") -> Work:
        # Weights are multiplied, two Gram matrices from both sides, and what is live of each sample divided:
        # once for all that read it, and rows of experts by what is looked up for each.
        work = Work()
        for observer in observers:
            if observer.group is None:
                continue
            for view in {type(view): view for view in observer.views}.values():
                k, stacked = view.in_features, isinstance(view, ExpertLinear)
                work["streamed"] += matrices_of(view) * 2 * 2 * 2 * FLOAT * k * k
                work["moved"] += samples * 2 * FLOAT * rows(view) * k
                work["calls"] += samples * (2 if stacked else 1)
            for view in observer.views:
                work["streamed"] += matrices_of(view) * 6 * FLOAT * view.out_features * view.in_features
                work["calls"] += 50
        return work

    def run(self, graph: Graph, context: Context) -> None:
        assert context.stage is not None
        scales, folded = graph.facts[Scales], graph.facts.get(FoldedScales) or FoldedScales()
        graph.facts[FoldedScales] = folded
        for group in context.stage.groups:
            chosen = scales.get(group.name)
            if chosen is None:
                continue
            group.fold(chosen, graph.weights)
            graph.facts[Activations].fold(group, chosen)
            graph.facts[Statistics].fold(group, chosen)
            folded[group.name] = chosen
            context.report.groups[group.name].applied = True
