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
from awqc.observers.input_statistics import BatchStatistics
from awqc.observers.stages import Observer
from awqc.observers.statistics import Statistics
from awqc.pipeline import Pass
from awqc.quantization.clipping import SHRINKS, clipped_grid
from awqc.quantization.grids import Grids
from awqc.quantization.loss import GATE_ROWS, gram_blocks, output_loss
from awqc.quantization.matrices import batches, stacked
from awqc.quantization.schemes import Schemes
from awqc.quantized import Grid, Scheme, minmax_grid, sample_rows
from awqc.ranks import ROWS, Ranks
from awqc.views import ExpertLinear, Linear
from awqc.work import Work, gram_rows, matrices_of, quantized_views


class _Chosen(NamedTuple):
    """Grids of B matrices, ``(B, N, G)`` each part; and of each matrix, ``(B, 3)``, the mean share of the
    range that its grid cuts off, and the losses of nearest rounding on held-out tokens on the min-max grid
    and on this one."""

    scales: Tensor
    zeros: Tensor
    numbers: Tensor


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
            work["calls"] += len(batches(view)) * (11 * len(self.shrinks) + 70)
        return work

    def run(self, graph: Graph, context: Context) -> None:
        assert context.stage is not None
        schemes, grids = graph.facts[Schemes], Grids()
        for observer in context.stage.observers:
            for view in observer.views:
                scheme = schemes.get(view.parameter)
                if scheme is None:
                    continue
                found = self._chosen(graph, observer.node, view, scheme, context.ranks)
                scales, zeros, numbers = (torch.cat(parts) for parts in zip(*found, strict=True))
                whole = isinstance(view, ExpertLinear)
                parts = (scales, zeros) if whole else (scales[0], zeros[0])
                grids[view.parameter] = Grid(*parts, scheme, view.in_features)
                cut, before, after = numbers.T.tolist()
                row = context.report.linears[view.parameter]
                row.clipped, energy = sum(cut) / len(cut), row.energy or 1.0
                row.steps += [("fold-scales", sum(before) / energy), (self.name, sum(after) / energy)]
        graph.facts[Grids] = grids

    def _chosen(
        self, graph: Graph, node: fx.Node, view: Linear | ExpertLinear, scheme: Scheme, ranks: Ranks
    ) -> list[_Chosen]:
        """What is chosen for the matrices of ``view``, in their order. Experts are divided among processes,
        a linear's rows are."""
        statistics, device = graph.facts[Statistics], graph.weights.device

        def of(part: range, ranks: Ranks) -> _Chosen:
            weight = stacked(view, graph.weights, part)
            return self._gated(weight, scheme, statistics.batch(node, view, part), ranks)

        if isinstance(view, Linear):
            return [of(part, ranks) for part in batches(view)]
        return ranks.map(lambda part: of(part, Ranks()), batches(view), device)

    def _gated(self, weight: Tensor, scheme: Scheme, statistics: BatchStatistics, ranks: Ranks) -> _Chosen:
        """The grids of ``weight`` ``(B, N, K)``: clipped where that is better on held-out tokens."""
        width = weight.shape[-1]
        blocks = gram_blocks(statistics.gram, scheme.group(width)).to(weight.device)

        def clipped_rows(part: range) -> tuple[Tensor, Tensor, Tensor]:
            grid, share = clipped_grid(weight[:, part.start : part.stop], scheme, blocks, self.shrinks)
            return grid.scales, grid.zeros, share

        found = ranks.map(clipped_rows, ranks.ranges(weight.shape[1], ROWS), weight.device)
        scales, zeros, share = (torch.cat(pieces, 1) for pieces in zip(*found, strict=True))
        full, rows = minmax_grid(weight, scheme), sample_rows(weight, GATE_ROWS)
        before, after = (
            output_loss(grid.sample(GATE_ROWS).nearest(rows) - rows, statistics.held_out)
            for grid in (full, Grid(scales, zeros, scheme, width))
        )
        better = after < before
        cut = torch.where(better, 1 - share.mean((-2, -1)), 0.0)
        numbers = torch.stack([cut, before, torch.where(better, after, before)], -1)
        better = better[:, None, None]
        return _Chosen(
            torch.where(better, scales, full.scales), torch.where(better, zeros, full.zeros), numbers
        )
