"""Round each linear's weight to its grid: with error compensation, or to the nearest.

Compensated rounding (GPTQ) uses the same Gram matrix as the search. It is kept for a linear only where it
lowers the error on held-out tokens. Without it in the pipeline, or with ``method="nearest"``, codes are
the nearest on the grid.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from awqc.context import Context
from awqc.graph import Graph
from awqc.grids import Grids
from awqc.loss import GATE_ROWS, output_loss
from awqc.pipeline import Pass
from awqc.quantized import Grid, Scheme, from_codes, minmax_grid, sample_rows
from awqc.rounding import ColumnGrid, compensated_codes, descend, feedback, in_place, visiting_order
from awqc.schemes import Schemes
from awqc.statistics import InputStatistics, Statistics
from awqc.views import Linear
from awqc.weights import Rounded


@dataclass(frozen=True)
class RoundWeights(Pass):
    """Codes for every linear of the stage; from here on its weight is the quantized one.

    Args:
        method: ``compensated`` (GPTQ) or ``nearest``.
        sweeps: rounds of coordinate descent after compensated rounding.
    """

    name: ClassVar[str] = "round-weights"
    scope: ClassVar = "stage"
    requires: ClassVar[tuple[type, ...]] = (Statistics, Schemes)
    consumes: ClassVar[tuple[type, ...]] = (Grids,)
    output: ClassVar = "lossy"

    method: Literal["compensated", "nearest"] = "compensated"
    sweeps: int = 0

    def run(self, graph: Graph, context: Context) -> None:
        assert context.stage is not None
        schemes = graph.facts[Schemes]
        for observer in context.stage.observers:
            by_scheme: dict[Scheme, list[Linear]] = {}
            for view in observer.linears:
                if view.parameter in schemes:
                    by_scheme.setdefault(schemes[view.parameter], []).append(view)
            # Linears that read the same input are rounded as one: the work of a step is per column.
            for views in by_scheme.values():
                self._round(graph, context, graph.facts[Statistics][observer.node], views)

    def _round(
        self, graph: Graph, context: Context, statistics: InputStatistics, views: list[Linear]
    ) -> None:
        schemes, chosen = graph.facts[Schemes], graph.facts.get(Grids) or Grids()
        weights = [view.weight(graph.weights[view.parameter]).float() for view in views]
        grids = [
            chosen.get(view.parameter) or minmax_grid(weight, schemes[view.parameter])
            for view, weight in zip(views, weights, strict=True)
        ]
        compensated = self._compensated(weights, grids, statistics) if self.method == "compensated" else None
        for i, (view, weight, grid) in enumerate(zip(views, weights, grids, strict=True)):
            rows, sample = sample_rows(weight, GATE_ROWS), grid.sample(GATE_ROWS)
            error = float(output_loss(sample.nearest(rows) - rows, statistics.held_out))
            codes, rounding = None, "nearest"
            if compensated is not None:
                chosen_rows = sample.decode(sample_rows(compensated[i], GATE_ROWS))
                improved = float(output_loss(chosen_rows - rows, statistics.held_out))
                if improved < error:
                    codes, error, rounding = compensated[i], improved, "compensated"
            row = context.report.linears[view.parameter]
            row.scheme, row.rounding = str(schemes[view.parameter]), rounding
            row.error = error / (row.energy or 1.0)
            codes = grid.encode(weight) if codes is None else codes
            graph.weights[view.parameter] = Rounded(from_codes(codes, grid), view.transposed)

    def _compensated(
        self, weights: list[Tensor], grids: list[Grid], statistics: InputStatistics
    ) -> list[Tensor]:
        """Codes ``(N, K)`` of every weight, from one run over the columns of all of them."""
        order = visiting_order(statistics.gram)
        factor = feedback(statistics.gram, order)
        weight = torch.cat(weights)
        columns = ColumnGrid.of(join(grids), order)
        codes = compensated_codes(weight, columns, factor, order)
        for _ in range(self.sweeps):
            codes = descend(codes, weight, columns, statistics.gram, order)
        return list(in_place(codes, order).split([len(w) for w in weights]))


def join(grids: list[Grid]) -> Grid:
    """One grid for the rows of all ``grids``, which share a scheme and a width."""
    first = grids[0]
    scales, zeros = (torch.cat([getattr(grid, part) for grid in grids]) for part in ("scales", "zeros"))
    return Grid(scales, zeros, first.scheme, first.in_features)
