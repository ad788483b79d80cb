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
from awqc.memory import Kind
from awqc.observers.activations import Activations
from awqc.observers.stages import Observer
from awqc.observers.statistics import Statistics
from awqc.pipeline import Pass
from awqc.quantization.scales import FoldedScales, Scales
from awqc.verify import CHECKED_ROWS
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
        # Weights are multiplied, samples divided, and the linears of one sample run before and after.
        work = Work()
        for observer in observers:
            for view in observer.views if observer.group is not None else ():
                n, k, count = view.out_features, view.in_features, matrices_of(view)
                work["streamed"] += count * (24 * n * k + 16 * k * k)
                work["moved"] += samples * 12 * rows(view) * k
                work["flops"] += 4 * min(rows(view), CHECKED_ROWS) * n * k
                work["calls"] += 200 + 8 * samples
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
