"""Choose each group's grid by exact loss over a ladder of clipped ranges.

Lossy: it fixes what values the codes can take. A linear keeps the min-max grid where clipping does not
lower its error on held-out tokens. Each expert has a grid of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, fx

from awqc.context import Context
from awqc.graph import Graph
from awqc.memory import Kind
from awqc.observers.input_statistics import InputStatistics
from awqc.observers.stages import Observer
from awqc.observers.statistics import Statistics
from awqc.pipeline import Pass
from awqc.quantization.clipping import SHRINKS, clipped_grid
from awqc.quantization.grids import Grids
from awqc.quantization.loss import GATE_ROWS, gram_blocks, output_loss
from awqc.quantization.matrices import Matrix, matrices, together
from awqc.quantization.schemes import Schemes
from awqc.quantized import Grid, Scheme, minmax_grid, sample_rows
from awqc.ranks import ROWS, Ranks
from awqc.views import ExpertLinear, Linear
from awqc.work import Work, gram_rows, matrices_of, quantized_views


class _Chosen(NamedTuple):
    """A grid, the mean share of the range that it cuts off, and the losses of nearest rounding on held-out
    tokens on the min-max grid and on this one."""

    grid: Grid
    cut: float
    before: float
    after: float


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

    def work(self, graph: Graph, observers: Sequence[Observer], samples: int, kind: Kind = "full") -> Work:
        work = Work()
        for _, view, _ in quantized_views(observers, graph.facts[Schemes]):
            n, k, count = view.out_features, view.in_features, matrices_of(view)
            work["clipped"] += count * n * k * len(self.shrinks)
            work["flops"] += count * 4 * min(n, GATE_ROWS) * k * gram_rows(k, kind)
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
                chosen = self._grids(graph, observer.node, view, scheme, context.ranks)
                grids[view.parameter] = together(view, [one.grid for one in chosen])
                row = context.report.linears[view.parameter]
                row.clipped = sum(one.cut for one in chosen) / len(chosen)
                energy = row.energy or 1.0
                row.steps += [
                    ("fold-scales", sum(one.before for one in chosen) / energy),
                    (self.name, sum(one.after for one in chosen) / energy),
                ]
        graph.facts[Grids] = grids

    def _grids(
        self, graph: Graph, node: fx.Node, view: Linear | ExpertLinear, scheme: Scheme, ranks: Ranks
    ) -> list[_Chosen]:
        """The grid of each matrix of ``view``. Experts are divided among processes, a linear's rows are."""
        device = graph.weights.device

        def of(matrix: Matrix, ranks: Ranks) -> _Chosen:
            statistics = graph.facts[Statistics].of(node, matrix)
            return self._grid(matrix.weight(graph.weights), scheme, statistics, ranks)

        def tensors(matrix: Matrix) -> tuple[Tensor, Tensor, float, float, float]:
            found = of(matrix, Ranks())
            return found.grid.scales, found.grid.zeros, found.cut, found.before, found.after

        if isinstance(view, Linear):
            return [of(matrix, ranks) for matrix in matrices(view)]
        return [
            _Chosen(Grid(scales, zeros, scheme, view.in_features), *numbers)
            for scales, zeros, *numbers in ranks.map(tensors, matrices(view), device)
        ]

    def _grid(self, weight: Tensor, scheme: Scheme, statistics: InputStatistics, ranks: Ranks) -> _Chosen:
        """The grid of ``weight`` ``(N, K)``."""
        blocks = gram_blocks(statistics.gram, scheme.group(weight.shape[1])).to(weight.device)

        def clipped_rows(part: range) -> tuple[Tensor, Tensor, Tensor]:
            grid, share = clipped_grid(weight[part.start : part.stop], scheme, blocks, self.shrinks)
            return grid.scales, grid.zeros, share

        found = ranks.map(clipped_rows, ranks.ranges(len(weight), ROWS), weight.device)
        scales, zeros, share = (torch.cat(pieces) for pieces in zip(*found, strict=True))
        clipped = Grid(scales, zeros, scheme, weight.shape[1])
        full, rows = minmax_grid(weight, scheme), sample_rows(weight, GATE_ROWS)
        before, after = (
            float(output_loss(grid.sample(GATE_ROWS).nearest(rows) - rows, statistics.held_out))
            for grid in (full, clipped)
        )
        if after < before:
            return _Chosen(clipped, float(1 - share.mean()), before, after)
        return _Chosen(full, 0.0, before, before)
