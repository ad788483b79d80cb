"""Choose each group's grid by exact loss over a ladder of clipped ranges.

Lossy: it fixes what values the codes can take. A linear keeps the min-max grid where clipping does not
lower its error on held-out tokens. Each expert has a grid of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from awqc.clipping import SHRINKS, clipped_grid
from awqc.context import Context
from awqc.graph import Graph
from awqc.grids import Grids
from awqc.input_statistics import InputStatistics
from awqc.loss import GATE_ROWS, gram_blocks, output_loss
from awqc.matrices import matrices, together
from awqc.pipeline import Pass
from awqc.quantized import Grid, Scheme, minmax_grid, sample_rows
from awqc.schemes import Schemes
from awqc.stages import Observer
from awqc.statistics import Statistics
from awqc.work import Work, matrices_of, quantized_views


@dataclass(frozen=True)
class ClipWeights(Pass):
    """A clipped grid for every linear of the stage.

    Args:
        shrinks: shares of the full range that are tried; 1.0 first.
    """

    name: ClassVar[str] = "clip-weights"
    scope: ClassVar = "stage"
    requires: ClassVar[tuple[type, ...]] = (Statistics, Schemes)
    provides: ClassVar[tuple[type, ...]] = (Grids,)
    output: ClassVar = "lossy"

    shrinks: tuple[float, ...] = SHRINKS

    def work(self, graph: Graph, observers: Sequence[Observer], samples: int) -> Work:
        work = Work()
        for _, view, _ in quantized_views(observers, graph.facts[Schemes]):
            n, k, count = view.out_features, view.in_features, matrices_of(view)
            work["clipped"] += count * n * k * len(self.shrinks)
            work["flops"] += count * 4 * min(n, GATE_ROWS) * k * k
            work["calls"] += count * (k // 128 + 20 * len(self.shrinks))
        return work

    def run(self, graph: Graph, context: Context) -> None:
        assert context.stage is not None
        schemes, grids = graph.facts[Schemes], Grids()
        for observer in context.stage.observers:
            for view in observer.views:
                scheme = schemes.get(view.parameter)
                if scheme is None:
                    continue
                chosen = []
                for matrix in matrices(view):
                    statistics = graph.facts[Statistics].of(observer.node, matrix)
                    chosen.append(self._grid(matrix.weight(graph.weights), scheme, statistics))
                grids[view.parameter] = together(view, [grid for grid, _ in chosen])
                context.report.linears[view.parameter].clipped = sum(cut for _, cut in chosen) / len(chosen)
        graph.facts[Grids] = grids

    def _grid(self, weight: Tensor, scheme: Scheme, statistics: InputStatistics) -> tuple[Grid, float]:
        """The grid of ``weight`` ``(N, K)`` and the mean share of its range that is cut off."""
        blocks = gram_blocks(statistics.gram, scheme.group(weight.shape[1]))
        clipped, share = clipped_grid(weight, scheme, blocks, self.shrinks)
        full, rows = minmax_grid(weight, scheme), sample_rows(weight, GATE_ROWS)
        before, after = (
            float(output_loss(grid.sample(GATE_ROWS).nearest(rows) - rows, statistics.held_out))
            for grid in (full, clipped)
        )
        return (clipped, float(1 - share.mean())) if after < before else (full, 0.0)
