"""Round each linear's weight to its grid: with error compensation, or to the nearest.

Compensated rounding (GPTQ) uses the same Gram matrix as the search. It is kept for a linear only where it
lowers the error on held-out tokens. Without it in the pipeline, or with ``method="nearest"``, codes are
the nearest on the grid.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from awqc.calibrate import Observer, Statistics
from awqc.context import Context
from awqc.graph import Graph
from awqc.grids import Grids
from awqc.loss import output_loss
from awqc.pipeline import Pass
from awqc.quantized import Grid, from_codes, minmax_grid
from awqc.rounding import ColumnGrid, compensated_codes, descend, in_place, inverse_factor, visiting_order
from awqc.schemes import Schemes
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
        for observer in context.stage.observers:
            views = [v for v in observer.linears if v.parameter in graph.facts[Schemes]]
            if views:
                self._round(graph, context, observer, views)

    def _round(self, graph: Graph, context: Context, observer: Observer, views: list[Linear]) -> None:
        statistics = graph.facts[Statistics][observer.node]
        schemes, grids = graph.facts[Schemes], graph.facts.get(Grids) or Grids()
        order = factor = None
        if self.method == "compensated":
            order = visiting_order(statistics.gram)
            factor = inverse_factor(statistics.gram, order)
        for view in views:
            weight = view.weight(graph.weights[view.parameter]).float()
            grid = grids.get(view.parameter) or minmax_grid(weight, schemes[view.parameter])
            codes, rounding = grid.encode(weight), "nearest"
            error = _error(grid, codes, weight, statistics.held_out)
            if factor is not None and order is not None:
                columns = ColumnGrid.of(grid, order)
                better = compensated_codes(weight, columns, factor, order)
                for _ in range(self.sweeps):
                    better = descend(better, weight, columns, statistics.gram, order)
                better = in_place(better, order)
                improved = _error(grid, better, weight, statistics.held_out)
                if improved < error:
                    codes, error, rounding = better, improved, "compensated"
            row = context.report.linears[view.parameter]
            row.scheme, row.rounding = str(schemes[view.parameter]), rounding
            row.error = error / (float(output_loss(weight, statistics.held_out)) or 1.0)
            graph.weights[view.parameter] = Rounded(from_codes(codes, grid), view.transposed)


def _error(grid: Grid, codes: Tensor, weight: Tensor, gram: Tensor) -> float:
    return float(output_loss(grid.decode(codes) - weight, gram))
