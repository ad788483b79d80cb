"""Search each group's input scale on the exact loss.

Candidates (AWQ, Lin et al. 2023, section 3.2), normalised by ``sqrt(max * min)``:

    activation    s = mean|x| ** r
    duo           s = mean|x| ** r / mean|w| ** (1 - r)

for ``r`` in a grid on [0, 1], and always the identity. The loss of a candidate is ``tr(E H E^T)`` summed
over the group's quantized linears, where ``E`` is the error of quantizing ``W diag(s)`` and undoing ``s``,
with the clipping and the compensated rounding that follow. Tied channels take the geometric mean. The
experts of a mixture are linears like others; where they have channels of their own, each has its own search.

All candidates are evaluated at once, on a sample of output channels: a candidate is a factor on the
columns of the quantization grid, so they differ in the grid only and share the Gram matrix and its
factorization. The winner must beat the identity on held-out tokens, or nothing is applied.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from awqc.context import Context
from awqc.errors import ConfigError
from awqc.graph import Graph
from awqc.memory import Kind
from awqc.observers.activations import Activations
from awqc.observers.grams import Gram, SampledGram
from awqc.observers.input_statistics import ALONE
from awqc.observers.stages import Observer
from awqc.observers.statistics import Statistics
from awqc.pipeline import Pass
from awqc.quantization.block_objective import BlockObjective
from awqc.quantization.clipping import clipped_grid
from awqc.quantization.columns import ColumnGrid
from awqc.quantization.loss import gram_blocks, output_loss
from awqc.quantization.matrices import batches, stacked
from awqc.quantization.members import Member, Parts, Run, parts
from awqc.quantization.rounding import compensated_codes, feedback, in_place, visiting_order
from awqc.quantization.scales import Scales
from awqc.quantization.schemes import Schemes
from awqc.quantized import Grid, Scheme, sample_rows
from awqc.ranks import Ranks
from awqc.report import GroupRow
from awqc.views import ExpertLinear
from awqc.work import Work, gram_rows, matrices_of, quantized_views


class _Outcome(NamedTuple):
    """What was tried on P parts of a group and what came out: their channels ``(P, C)``, names of the S
    candidates and their search losses ``(P, S)``, the best of each with its scales ``(P, C)``, and the
    held-out losses of the identity and of the best."""

    channels: Tensor
    labels: list[tuple[str, float]]
    search: Tensor
    best: list[int]
    chosen: Tensor
    before: list[float]
    after: list[float]

    @property
    def applied(self) -> list[bool]:
        """Of each part whether the best candidate is worth folding."""
        results = zip(self.best, self.before, self.after, strict=True)
        return [best > 0 and after < before for best, before, after in results]

    @property
    def scales(self) -> Tensor:
        """``(P, C)``; 1 where nothing is to be folded."""
        applied = torch.tensor(self.applied, device=self.chosen.device)
        return torch.where(applied[:, None], self.chosen, 1.0)


@dataclass(frozen=True)
class SearchScales(Pass):
    """Choose a scale vector for every group of the stage.

    Args:
        grid: ratios tried in [0, 1].
        families: candidate families.
        sample_rows: output channels of each linear that the search looks at; 0 for all.
        shrinks: clipping that is searched along; ``(1.0,)`` searches with the min-max grid.
        rounding: how candidates are rounded: to the nearest, or as ``round-weights`` will. The second
            costs more and chose no better where it was measured (docs/quality.md).
        objective: where losses are measured: at the linears' own outputs, exactly and over all tokens,
            or at the output of the block they feed, over a few samples (all rows, finalists only).
        finalists: candidates that the block objective compares, the best by the other.
    """

    name: ClassVar[str] = "search-scales"
    scope: ClassVar = "stage"
    requires: ClassVar[tuple[type, ...]] = (Statistics, Schemes)
    provides: ClassVar[tuple[type, ...]] = (Scales,)

    grid: int = 10
    families: tuple[Literal["activation", "duo"], ...] = ("activation", "duo")
    sample_rows: int = 32
    shrinks: tuple[float, ...] = (1.0, 0.84, 0.7)
    rounding: Literal["nearest", "compensated"] = "nearest"
    objective: Literal["linear", "block"] = "linear"
    finalists: int = 8

    def work(self, graph: Graph, observers: Sequence[Observer], samples: int, kind: Kind = "full") -> Work:
        work, candidates = Work(), 1 + self.grid * len(self.families)
        grouped = [observer for observer in observers if observer.group is not None]
        for _, view, _ in quantized_views(grouped, graph.facts[Schemes]):
            n, k, count = view.out_features, view.in_features, matrices_of(view)
            rows = min(n, self.sample_rows or n)
            sampled = count * (candidates + 2) * rows
            work["clipped"] += 2 * sampled * k * len(self.shrinks)  # input scales are divided out as well
            work["flops"] += 2 * sampled * k * gram_rows(k, kind)
            work["moved"] += 16 * sampled * k
            work["streamed"] += count * 12 * n * k
            work["calls"] += 2 * candidates + len(batches(view, candidates * rows)) * (
                2 * (12 * len(self.shrinks) + 82)
            )
            if self.rounding == "compensated" and kind != "sampled":
                work["columns"] += count * 2 * k
                work["elements"] += sampled * k
                work["flops"] += sampled * k * k
        return work

    def run(self, graph: Graph, context: Context) -> None:
        assert context.stage is not None
        scales = Scales()
        for group in context.stage.groups:
            observers = [o for o in context.stage.observers if o.group is group]
            found = [self._search(graph, each, context.ranks) for each in parts(graph, observers, group)]
            if not found:
                continue
            _report(context.report.groups[group.name], found)
            if any(any(outcome.applied) for outcome in found):
                chosen = torch.ones(group.channels, device=graph.weights.device)
                for outcome in found:
                    chosen[outcome.channels] = outcome.scales
                scales[group.name] = chosen
                row = context.report.groups[group.name]
                row.scale_range = float(chosen.min()), float(chosen.max())
        graph.facts[Scales] = scales

    def _search(self, graph: Graph, group: Parts, ranks: Ranks) -> _Outcome:
        labels, candidates = self.candidates(graph, group, ranks)
        search = self._losses(graph, group, candidates, ranks)
        best = search.argmin(1)
        if self.objective == "block":
            best = self._best_by_block(graph, group, candidates, search, ranks)
        chosen = candidates[torch.arange(len(best), device=best.device), best]
        gate = torch.stack([candidates[:, 0], chosen], 1)
        before, after = self._losses(graph, group, gate, ranks, held_out=True).T.tolist()
        return _Outcome(group.channels, labels, search, best.tolist(), chosen, before, after)

    def candidates(
        self, graph: Graph, group: Parts, ranks: Ranks = ALONE
    ) -> tuple[list[tuple[str, float]], Tensor]:
        """The identity, then every family at every ratio: their names, and ``(P, S, C)``."""
        statistics, weights = graph.facts[Statistics], graph.weights

        def magnitude_of(member: Member, run: Run) -> Tensor:
            return statistics.batch(member.node, member.view, run.matrices).mean_abs

        def weight_of(member: Member, run: Run) -> Tensor:
            return _normalised_magnitude(stacked(member.view, weights, run.matrices))

        magnitude = _per_channel(group, self._of_all(group, magnitude_of, ALONE))
        weight = _per_channel(group, self._of_all(group, weight_of, ranks))
        labels, found = [("identity", 0.0)], [torch.ones_like(magnitude)]
        for family in self.families:
            for step in range(self.grid):
                ratio = step / self.grid if family == "duo" else (step + 1) / self.grid
                scales = magnitude**ratio
                if family == "duo":
                    scales = scales / weight ** (1 - ratio)
                labels.append((family, ratio))
                found.append(scales)
        return labels, _normalised(torch.stack(found, 1), group.alive[:, None])

    def _of_all(self, group: Parts, work: Callable[[Member, Run], Tensor], ranks: Ranks) -> list[Tensor]:
        """What ``work`` finds of the matrices of each member ``(P, M, ...)``, as many at once as fit; divided
        among processes."""
        candidates = 1 + self.grid * len(self.families)
        runs = [m.runs(candidates * (self.sample_rows or m.view.out_features)) for m in group.members]
        items = [(member, run) for member, own in zip(group.members, runs, strict=True) for run in own]
        made = iter(ranks.map(lambda item: work(*item), items, group.channels.device))
        found = []
        for member, own in zip(group.members, runs, strict=True):
            whole = torch.cat([next(made) for _ in own])
            found.append(whole.unflatten(0, (len(member.matrices), -1)))
        return found

    def _losses(
        self, graph: Graph, group: Parts, candidates: Tensor, ranks: Ranks, held_out: bool = False
    ) -> Tensor:
        """Losses ``(P, S)`` of ``candidates`` ``(P, S, C)``, rounded by the search tokens, on those or on the
        held-out tokens."""
        factors: dict[int, tuple[Tensor, Tensor]] = {}

        def of(member: Member, run: Run) -> Tensor:
            weight = stacked(member.view, graph.weights, run.matrices)
            statistics = graph.facts[Statistics].batch(member.node, member.view, run.matrices)
            rows, columns = sample_rows(weight, self.sample_rows), member.columns(candidates, run)
            errors = self._errors(member.scheme, rows, columns, statistics.gram, factors)
            losses = output_loss(errors, statistics.held_out if held_out else statistics.gram)
            return losses * (weight.shape[1] / rows.shape[1]) * statistics.shares[:, None]

        total = torch.zeros(candidates.shape[:2], device=candidates.device)
        for losses in self._of_all(group, of, ranks):
            total = total + losses.sum(1)
        return total

    def _errors(
        self,
        scheme: Scheme,
        rows: Tensor,
        columns: Tensor,
        gram: Gram,
        factors: dict[int, tuple[Tensor, Tensor]],
    ) -> Tensor:
        """What rounding ``rows`` ``(B, R, K)`` under the input scales ``columns`` ``(B, S, K)`` adds to them,
        seen from the unscaled input: ``(B, S, R, K)``."""
        size, k = (*columns.shape[:2], *rows.shape[1:]), rows.shape[-1]
        spread = columns[:, :, None].expand(size).flatten(1, 2)
        scaled = (rows[:, None] * columns[:, :, None]).flatten(1, 2)
        blocks = gram_blocks(gram, scheme.group(k)).to(rows.device)
        grid, _ = clipped_grid(scaled, scheme, blocks, self.shrinks, spread)
        if self.rounding == "nearest" or isinstance(gram, SampledGram):
            return ((grid.nearest(scaled) - scaled) / spread).view(size)
        found = []
        for i, one in enumerate(gram.expand(len(rows), k, k)):
            if one.data_ptr() not in factors:
                factors.clear()  # those of one are large
                here = one.to(rows.device)
                order = visiting_order(here)
                factors[one.data_ptr()] = order, feedback(here, order)
            order, factor = factors[one.data_ptr()]
            alone = Grid(grid.scales[i], grid.zeros[i], scheme, k)
            weight, by_column = rows[i].repeat(size[1], 1), ColumnGrid.of(alone, order, spread[i])
            codes = in_place(compensated_codes(weight, by_column, factor, order), order)
            found.append(alone.decode(codes) / spread[i] - weight)
        return torch.stack(found).view(size)

    def _best_by_block(
        self, graph: Graph, group: Parts, candidates: Tensor, search: Tensor, ranks: Ranks
    ) -> Tensor:
        """Of each part the candidate with the least loss at the output of the block, ``(P,)``."""
        if ranks.count > 1:
            raise ConfigError(
                "objective='block' compares samples that one process holds: use the objective 'linear', or "
                "one process"
            )
        block = BlockObjective(graph, graph.facts[Activations], [m.view for m in group.members])

        def loss(part: int, candidate: int) -> float:
            replaced: dict[str, Tensor] = {}
            for member in group.members:
                each, name = len(member.matrices[part]), member.view.parameter
                if name not in replaced:
                    replaced[name] = graph.weights[name].clone()
                whole = member.view.weight(replaced[name])
                whole = whole if isinstance(member.view, ExpertLinear) else whole[None]
                for i, number in enumerate(member.matrices[part]):
                    place, one = part * each + i, range(number, number + 1)
                    run = Run(range(place, place + 1), one)
                    columns = member.columns(candidates[:, candidate : candidate + 1], run)
                    gram = graph.facts[Statistics].batch(member.node, member.view, one).gram
                    weight = stacked(member.view, graph.weights, one)
                    whole[number] += self._errors(member.scheme, weight, columns, gram, {})[0, 0]
            return block.loss(replaced)

        best = []
        for part, losses in enumerate(search):
            finalists = sorted({0, *torch.argsort(losses)[: self.finalists].tolist()})
            best.append(min(finalists, key=lambda candidate: loss(part, candidate)))
        return torch.tensor(best, device=search.device)


def _per_channel(group: Parts, columns: list[Tensor]) -> Tensor:
    """Geometric mean ``(P, C)``, over all columns of all members that share a channel, of a positive
    statistic ``(P, M, K)`` of each member."""
    (count, channels), device = group.channels.shape, group.channels.device
    total = torch.zeros(count * (channels + 1), device=device)
    terms = torch.zeros_like(total)
    first = torch.arange(count, device=device)[:, None] * (channels + 1)
    for member, values in zip(group.members, columns, strict=True):
        logs, share = values.clamp(min=1e-8).log() / member.degree, 1.0
        if member.ids.shape[1] == 1:  # all read the same channels: these are added to once
            logs, share = logs.sum(1, keepdim=True), float(values.shape[1])
        for ids, each in zip(member.ids.unbind(1), logs.unbind(1), strict=True):
            # Columns without a channel (id -1) collect in an extra last element.
            index = (torch.where(ids >= 0, ids, channels) + first).flatten()
            total.index_add_(0, index, each.flatten())
            terms.index_add_(0, index, torch.full_like(each, share).flatten())
    return (total / terms.clamp(min=1)).view(count, channels + 1)[:, :-1].exp()


def _report(row: GroupRow, found: list[_Outcome]) -> None:
    """State the outcome of a group: of its only part, or of all parts together."""
    labels = found[0].labels
    losses = torch.cat([outcome.search for outcome in found]).sum(0)
    relative = (losses / losses[0]).tolist()
    row.curve = [(*label, loss) for label, loss in zip(labels, relative, strict=True)]
    chosen = [labels[b] for o in found for b, applied in zip(o.best, o.applied, strict=True) if applied]
    if chosen:
        # Of several parts, what most of them chose.
        (row.family, row.ratio), _ = Counter(chosen).most_common(1)[0]
    alone = sum(len(outcome.best) for outcome in found) == 1
    before, after = 0.0, 0.0
    for outcome in found:
        for applied, *losses_of in zip(outcome.applied, outcome.before, outcome.after, strict=True):
            before += losses_of[0]
            after += losses_of[applied or alone]
    row.gain = 1 - after / max(before, torch.finfo(torch.float32).tiny)


def _normalised_magnitude(weight: Tensor) -> Tensor:
    """Mean over rows of ``|w| / max|w of its row|``: ``(B, K)`` of ``(B, N, K)``."""
    return (weight.abs() / weight.abs().amax(-1, keepdim=True).clamp(min=1e-8)).mean(-2)


def _normalised(scales: Tensor, alive: Tensor) -> Tensor:
    """``scales`` ``(..., C)`` around 1; 1 where they are not ``alive``."""
    largest = scales.where(alive, -torch.inf).amax(-1, keepdim=True)
    smallest = scales.where(alive, torch.inf).amin(-1, keepdim=True)
    scales = scales / (largest * smallest).sqrt()
    return torch.where(alive, scales.clamp(1e-4, 1e4), 1.0)
