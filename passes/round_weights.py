"""Round each linear's weight to its grid: with error compensation, or to the nearest.

Compensated rounding (GPTQ) uses the same Gram matrix as the search. It is kept for a linear only where it
lowers the error on held-out tokens, each expert by its own. Without it in the pipeline, or with
``method="nearest"``, codes are the nearest on the grid.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from awqc.context import Context
from awqc.graph import Graph
from awqc.memory import ROUNDED_AT_ONCE, Kind
from awqc.needs import StageNeeds
from awqc.observers.grams import Gram
from awqc.observers.stages import Observer
from awqc.observers.statistics import Statistics
from awqc.pipeline import Pass
from awqc.quantization.columns import ColumnGrid
from awqc.quantization.grids import Grids
from awqc.quantization.loss import GATE_ROWS, output_loss
from awqc.quantization.matrices import batches, matrices, stacked, stacked_grid
from awqc.quantization.rounding import (
    compensated_codes,
    descend,
    feedback,
    in_place,
    visiting_order,
)
from awqc.quantization.schemes import Schemes
from awqc.quantized import Grid, Scheme, from_codes, minmax_grid, sample_rows
from awqc.ranks import ROWS, Ranks
from awqc.views import ExpertLinear, Linear
from awqc.weights import Rounded
from awqc.work import Work, gram_rows, matrices_of, quantized_views


class _Rounded(NamedTuple):
    """B matrices, rounded: codes ``(B, N, K)`` uint8 on a grid ``(B, N, G)``, and of each its loss on
    held-out tokens and how it was rounded."""

    codes: Tensor
    scales: Tensor
    zeros: Tensor
    errors: list[float]
    how: list[str]

    @staticmethod
    def join(parts: Sequence[_Rounded]) -> _Rounded:
        """Those of all ``parts``."""
        if len(parts) == 1:
            return parts[0]
        return _Rounded(
            torch.cat([part.codes for part in parts]),
            torch.cat([part.scales for part in parts]),
            torch.cat([part.zeros for part in parts]),
            [error for part in parts for error in part.errors],
            [how for part in parts for how in part.how],
        )


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
    repeatable: ClassVar = True

    method: Literal["compensated", "nearest"] = "compensated"
    sweeps: int = 0

    def work(self, graph: Graph, observers: Sequence[Observer], samples: int, kind: Kind = "full") -> Work:
        work, joined = Work(), Counter[tuple[str, Scheme, int, int]]()
        needs = graph.facts.get(StageNeeds)
        elements = ROUNDED_AT_ONCE if needs is None else needs.at_once
        for observer, view, scheme in quantized_views(observers, graph.facts[Schemes]):
            n, k, count = view.out_features, view.in_features, matrices_of(view)
            work["flops"] += count * 4 * min(n, GATE_ROWS) * k * gram_rows(k, kind)
            work["streamed"] += count * 40 * n * k
            work["calls"] += count * 4 + len(batches(view)) * 30
            if self.method == "nearest" or kind == "sampled":
                continue
            work["elements"] += (1 + self.sweeps) * count * n * k
            work["flops"] += (1 + self.sweeps) * count * n * k * k
            # Steps are shared by all that read an input; so are factors, and some experts at a time.
            key = observer.name, scheme, k, count
            work["factored"] += 0 if key in joined else count * k**3 // 3
            work["calls"] += 0 if key in joined else count * 60
            joined[key] += n
        for (_, _, k, count), n in joined.items():
            at_once, rows = max(1, elements // (k * max(n, k))), max(1, elements // k)
            work["columns"] += k * (1 + self.sweeps) * -(-count // at_once) * -(-n // rows)
        return work

    def run(self, graph: Graph, context: Context) -> None:
        assert context.stage is not None
        schemes = graph.facts[Schemes]
        for observer in context.stage.observers:
            by_scheme: dict[tuple[Scheme, bool], list[Linear | ExpertLinear]] = {}
            for view in observer.views:
                if view.parameter in schemes and graph.weights.scheme(view.parameter) is None:
                    key = schemes[view.parameter], isinstance(view, ExpertLinear)
                    by_scheme.setdefault(key, []).append(view)
            for views in by_scheme.values():
                self._round(graph, context, observer, views)

    def _round(
        self, graph: Graph, context: Context, observer: Observer, views: Sequence[Linear | ExpertLinear]
    ) -> None:
        """Round ``views``, all of them linears or all of them stacks, which share an input and a scheme."""
        scheme, chosen = graph.facts[Schemes][views[0].parameter], graph.facts.get(Grids) or Grids()
        statistics, ranks, own = graph.facts[Statistics], context.ranks, matrices(views[0])

        def rounded(part: range, ranks: Ranks) -> list[_Rounded]:
            """Of each view the matrices numbered ``part``. What reads the same input is rounded as one: the
            work of a step is per column."""
            weights = [stacked(view, graph.weights, part) for view in views]
            grids = [
                stacked_grid(view, chosen[view.parameter], part)
                if view.parameter in chosen
                else minmax_grid(weight, scheme)
                for view, weight in zip(views, weights, strict=True)
            ]
            codes = self._compensated(
                [list(each) for each in zip(*weights, strict=True)],
                [list(each) for each in zip(*(grid.each() for grid in grids), strict=True)],
                [statistics.of(observer.node, own[number]).gram for number in part],
                ranks,
                statistics.at_once,
            )

            def better(i: int, view: Linear | ExpertLinear, run: range) -> _Rounded:
                some = slice(run.start, run.stop)
                held_out = statistics.batch(observer.node, view, part[some]).held_out
                return _better(weights[i][some], grids[i].some(some), [of[i] for of in codes[some]], held_out)

            return [
                _Rounded.join([better(i, view, run) for run in batches(view) if run.start < len(part)])
                for i, view in enumerate(views)
            ]

        if len(own) == 1 or ranks.count == 1:
            done = [rounded(range(len(own)), ranks)]
        else:
            parts = ranks.ranges(len(own))
            done = ranks.map(lambda part: rounded(part, Ranks()), parts, graph.weights.device)
        for view, made_of in zip(views, zip(*done, strict=True), strict=True):
            made, row = _Rounded.join(made_of), context.report.linears[view.parameter]
            row.scheme = str(scheme)
            row.rounding = (
                made.how[0] if len(set(made.how)) == 1 else f"{made.how.count('compensated')} compensated"
            )
            row.error = sum(made.errors) / (row.energy or 1.0)
            row.steps.append((self.name, row.error))
            whole: slice | int = slice(None) if isinstance(view, ExpertLinear) else 0
            grid = Grid(made.scales, made.zeros, scheme, view.in_features).some(whole)
            graph.weights[view.parameter] = Rounded(from_codes(made.codes[whole], grid), view.transposed)

    def _compensated(
        self,
        weights: list[list[Tensor]],
        grids: list[list[Grid]],
        grams: list[Gram],
        ranks: Ranks,
        elements: int,
    ) -> list[list[Tensor]]:
        """Codes ``(N, K)`` of every weight, from one run over the columns of all that share a Gram matrix and
        of some rows or experts at a time, about so many ``elements``; nothing if rounding is to the nearest,
        as it is where a Gram matrix is not held. The rows of a single run are divided among processes."""
        full = [gram for gram in grams if isinstance(gram, Tensor)]
        if self.method == "nearest" or len(full) < len(grams):
            return []
        device = weights[0][0].device
        n, k = sum(len(w) for w in weights[0]), weights[0][0].shape[1]
        at_once = max(1, elements // (k * max(n, k)))
        found = []
        for start in range(0, len(weights), at_once):
            chunk = range(start, min(start + at_once, len(weights)))
            these = [join(grids[e]) for e in chunk]
            if len(chunk) == 1:
                codes = [self._rows(weights[start], these[0], full[start].to(device), ranks, elements)]
            else:
                codes = self._experts([weights[e] for e in chunk], these, [full[e] for e in chunk])
            for e, made in zip(chunk, codes, strict=True):
                found.append(list(made.split([len(w) for w in weights[e]])))
        return found

    def _experts(self, weights: list[list[Tensor]], grids: list[Grid], grams: list[Tensor]) -> list[Tensor]:
        """Codes ``(N, K)`` of the rows of each of ``weights``, from one run over the columns of all."""
        first, count = weights[0][0], len(weights)
        k = first.shape[1]
        rows = first.new_empty(count, sum(len(weight) for weight in weights[0]), k)
        factors, orders, columns = first.new_empty(count, k, k), list[Tensor](), list[ColumnGrid]()
        for i, gram in enumerate(grams):
            here = gram.to(first.device)
            orders.append(visiting_order(here))
            factors[i] = feedback(here, orders[i])
            columns.append(ColumnGrid.of(grids[i], orders[i]))
            torch.cat(weights[i], out=rows[i])
        codes = compensated_codes(rows, ColumnGrid.stack(columns), factors, torch.stack(orders))
        return [
            in_place(self._swept(one, rows[i], columns[i], grams[i], orders[i]), orders[i])
            for i, one in enumerate(codes.unbind(1))
        ]

    def _rows(self, weights: list[Tensor], grid: Grid, gram: Tensor, ranks: Ranks, elements: int) -> Tensor:
        """Codes ``(N, K)`` of the rows of ``weights``, some at a time, and some by each process: no row knows
        of another."""
        order = visiting_order(gram)
        factor = feedback(gram, order)
        bounds = list(accumulate((len(weight) for weight in weights), initial=0))

        def some(part: range) -> Tensor:
            pieces = [
                weight[max(part.start - first, 0) : max(part.stop - first, 0)]
                for first, weight in zip(bounds, weights, strict=False)
            ]
            pieces = [piece for piece in pieces if len(piece)]
            rows = torch.cat(pieces) if len(pieces) > 1 else pieces[0]
            columns = ColumnGrid.of(grid.rows(part), order)
            codes = compensated_codes(rows, columns, factor, order)
            return self._swept(codes, rows, columns, gram, order)

        def of(part: range) -> Tensor:
            at_once = max(ROWS, elements // grid.in_features // ROWS * ROWS)
            starts = range(part.start, part.stop, at_once)
            return torch.cat([some(range(at, min(at + at_once, part.stop))) for at in starts], 1)

        codes = torch.cat(ranks.map(of, ranks.ranges(bounds[-1], ROWS), gram.device), 1)
        return in_place(codes, order)

    def _swept(self, codes: Tensor, weight: Tensor, grid: ColumnGrid, gram: Tensor, order: Tensor) -> Tensor:
        for _ in range(self.sweeps):
            codes = descend(codes, weight, grid, gram.to(weight.device), order)
        return codes


def _better(weight: Tensor, grid: Grid, compensated: Sequence[Tensor], held_out: Gram) -> _Rounded:
    """``weight`` ``(B, N, K)`` on its grid, each matrix by the way of rounding that does better on held-out
    tokens; ``compensated`` are codes of each, or there are none."""
    rows, sample = sample_rows(weight, GATE_ROWS), grid.sample(GATE_ROWS)
    nearest = output_loss(sample.nearest(rows) - rows, held_out)
    losses = [nearest, nearest]
    if compensated:
        tried = sample.decode(torch.stack([sample_rows(codes, GATE_ROWS) for codes in compensated]))
        losses[1] = output_loss(tried - rows, held_out)
    codes = torch.empty(weight.shape, dtype=torch.uint8, device=weight.device)
    errors, how = [], []
    for i, (one, (error, improved)) in enumerate(
        zip(grid.each(), torch.stack(losses, 1).tolist(), strict=True)
    ):
        better = improved < error
        codes[i] = compensated[i] if better else one.encode(weight[i])
        errors.append(improved if better else error)
        how.append("compensated" if better else "nearest")
    return _Rounded(codes, grid.scales, grid.zeros, errors, how)


def join(grids: list[Grid]) -> Grid:
    """One grid for the rows of all ``grids``, which share a scheme and a width."""
    first = grids[0]
    scales, zeros = (torch.cat([getattr(grid, part) for grid in grids]) for part in ("scales", "zeros"))
    return Grid(scales, zeros, first.scheme, first.in_features)
