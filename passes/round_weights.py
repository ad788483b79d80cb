"""Round each linear's weight to its grid: with error compensation, or to the nearest.

Compensated rounding (GPTQ) uses the same Gram matrix as the search. It is kept for a linear only where it
lowers the error on held-out tokens, each expert by its own. Without it in the pipeline, or with
``method="nearest"``, codes are the nearest on the grid.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from awqc.context import Context
from awqc.graph import Graph
from awqc.grids import Grids
from awqc.input_statistics import InputStatistics
from awqc.loss import GATE_ROWS, output_loss
from awqc.matrices import apart, matrices
from awqc.pipeline import Pass
from awqc.quantized import Grid, QuantizedWeight, Scheme, from_codes, minmax_grid, sample_rows, stack
from awqc.rounding import ColumnGrid, compensated_codes, descend, feedback, in_place, visiting_order
from awqc.schemes import Schemes
from awqc.stages import Observer
from awqc.statistics import Statistics
from awqc.views import ExpertLinear, Linear
from awqc.weights import Rounded


class _Rounded(NamedTuple):
    """A rounded matrix, its loss on held-out tokens, and how it was rounded."""

    weight: QuantizedWeight
    error: float
    rounding: str


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
            by_scheme: dict[tuple[Scheme, bool], list[Linear | ExpertLinear]] = {}
            for view in observer.views:
                if view.parameter in schemes:
                    key = schemes[view.parameter], isinstance(view, ExpertLinear)
                    by_scheme.setdefault(key, []).append(view)
            for views in by_scheme.values():
                self._round(graph, context, observer, views)

    def _round(
        self, graph: Graph, context: Context, observer: Observer, views: Sequence[Linear | ExpertLinear]
    ) -> None:
        """Round ``views``, all of them linears or all of them stacks, which share an input and a scheme."""
        schemes, chosen = graph.facts[Schemes], graph.facts.get(Grids) or Grids()
        found: dict[str, list[_Rounded]] = {view.parameter: [] for view in views}
        grids = {v.parameter: apart(v, chosen[v.parameter]) for v in views if v.parameter in chosen}
        # What reads the same input is rounded as one: the work of a step is per column.
        for index, group in enumerate(zip(*map(matrices, views), strict=True)):
            weights = [matrix.weight(graph.weights) for matrix in group]
            on = [
                grids[matrix.parameter][index]
                if matrix.parameter in grids
                else minmax_grid(weight, schemes[matrix.parameter])
                for matrix, weight in zip(group, weights, strict=True)
            ]
            statistics = graph.facts[Statistics].of(observer.node, group[0])
            for matrix, rounded in zip(group, self._rounded(weights, on, statistics), strict=True):
                found[matrix.parameter].append(rounded)
        for view in views:
            each, row = found[view.parameter], context.report.linears[view.parameter]
            row.scheme = str(schemes[view.parameter])
            how = [one.rounding for one in each]
            row.rounding = how[0] if len(set(how)) == 1 else f"{how.count('compensated')} compensated"
            row.error = sum(one.error for one in each) / (row.energy or 1.0)
            weight = stack([one.weight for one in each]) if isinstance(view, ExpertLinear) else each[0].weight
            graph.weights[view.parameter] = Rounded(weight, view.transposed)

    def _rounded(
        self, weights: list[Tensor], grids: list[Grid], statistics: InputStatistics
    ) -> Iterator[_Rounded]:
        """Each of ``weights`` ``(N, K)`` on its grid, the better way on held-out tokens."""
        compensated = self._compensated(weights, grids, statistics) if self.method == "compensated" else None
        for i, (weight, grid) in enumerate(zip(weights, grids, strict=True)):
            rows, sample = sample_rows(weight, GATE_ROWS), grid.sample(GATE_ROWS)
            error = float(output_loss(sample.nearest(rows) - rows, statistics.held_out))
            if compensated is not None:
                chosen_rows = sample.decode(sample_rows(compensated[i], GATE_ROWS))
                improved = float(output_loss(chosen_rows - rows, statistics.held_out))
                if improved < error:
                    yield _Rounded(from_codes(compensated[i], grid), improved, "compensated")
                    continue
            yield _Rounded(from_codes(grid.encode(weight), grid), error, "nearest")

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
