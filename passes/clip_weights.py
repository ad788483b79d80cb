"""Choose each group's grid by exact loss over a ladder of clipped ranges.

Lossy: it fixes what values the codes can take. A linear keeps the min-max grid where clipping does not
lower its error on held-out tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from awqc.clipping import SHRINKS, clipped_grid
from awqc.context import Context
from awqc.graph import Graph
from awqc.grids import Grids
from awqc.loss import GATE_ROWS, gram_blocks, output_loss
from awqc.pipeline import Pass
from awqc.quantized import minmax_grid, sample_rows
from awqc.schemes import Schemes
from awqc.statistics import Statistics


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

    def run(self, graph: Graph, context: Context) -> None:
        assert context.stage is not None
        schemes, grids = graph.facts[Schemes], Grids()
        for observer in context.stage.observers:
            statistics = graph.facts[Statistics][observer.node]
            for view in observer.linears:
                scheme = schemes.get(view.parameter)
                if scheme is None:
                    continue
                weight = view.weight(graph.weights[view.parameter]).float()
                blocks = gram_blocks(statistics.gram, scheme.group(view.in_features))
                clipped, share = clipped_grid(weight, scheme, blocks, self.shrinks)
                full = minmax_grid(weight, scheme)
                rows = sample_rows(weight, GATE_ROWS)
                losses = [
                    float(output_loss(grid.sample(GATE_ROWS).nearest(rows) - rows, statistics.held_out))
                    for grid in (full, clipped)
                ]
                row = context.report.linears[view.parameter]
                if losses[1] < losses[0]:
                    grids[view.parameter], row.clipped = clipped, float(1 - share.mean())
                else:
                    grids[view.parameter], row.clipped = full, 0.0
        graph.facts[Grids] = grids
