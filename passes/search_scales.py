"""Search each group's input scale on the exact loss.

Candidates (AWQ, Lin et al. 2023, section 3.2), normalised by ``sqrt(max * min)``:

    activation    s = mean|x| ** r
    duo           s = mean|x| ** r / mean|w| ** (1 - r)

for ``r`` in a grid on [0, 1], and always the identity. The loss of a candidate is ``tr(E H E^T)`` summed
over the group's quantized linears, where ``E`` is the error of quantizing ``W diag(s)`` and undoing ``s``,
with the clipping and the compensated rounding that follow. Tied channels take the geometric mean.

All candidates are evaluated at once, on a sample of output channels: a candidate is a factor on the
columns of the quantization grid, so they differ in the grid only and share the Gram matrix and its
factorization. The winner must beat the identity on held-out tokens, or nothing is applied.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from awqc.activations import Activations
from awqc.block_objective import BlockObjective
from awqc.clipping import clipped_grid
from awqc.context import Context
from awqc.graph import Graph
from awqc.groups import ScaleGroup
from awqc.loss import gram_blocks, output_loss
from awqc.pipeline import Pass
from awqc.quantized import Scheme, sample_rows
from awqc.rounding import ColumnGrid, compensated_codes, feedback, in_place, visiting_order
from awqc.scales import Scales
from awqc.schemes import Schemes
from awqc.stages import Observer
from awqc.statistics import InputStatistics, Statistics
from awqc.views import Linear

Candidate = tuple[str, float, Tensor]


@dataclass(frozen=True)
class _Member:
    """One quantized linear of a group, as the search sees it."""

    view: Linear
    weight: Tensor
    scheme: Scheme
    statistics: InputStatistics
    ids: Tensor
    degree: float

    def columns(self, scales: Tensor) -> Tensor:
        """The factor of each input column, ``(K,)``."""
        padded = torch.cat([scales, scales.new_ones(1)])
        return padded[self.ids] ** self.degree


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

    def run(self, graph: Graph, context: Context) -> None:
        assert context.stage is not None
        scales = Scales()
        for group in context.stage.groups:
            observers = [o for o in context.stage.observers if o.group is group]
            members = list(_members(graph, observers, group))
            if not members:
                continue
            row = context.report.groups[group.name]
            candidates = self.candidates(group, members)
            search = self._losses(members, candidates)
            row.curve = [
                (family, ratio, float(loss / search[0]))
                for (family, ratio, _), loss in zip(candidates, search, strict=True)
            ]
            best = int(search.argmin())
            if self.objective == "block":
                best = self._best_by_block(graph, members, candidates, search)
            family, ratio, chosen = candidates[best]
            before, after = self._losses(members, [candidates[0], candidates[best]], held_out=True)
            row.gain = float(1 - after / before.clamp(min=torch.finfo(before.dtype).tiny))
            if best and row.gain > 0:
                scales[group.name] = chosen
                row.family, row.ratio = family, ratio
        graph.facts[Scales] = scales

    def candidates(self, group: ScaleGroup, members: list[_Member]) -> list[Candidate]:
        """The identity, then every family at every ratio; ``(channels,)`` each."""
        magnitude = _per_channel(group, members, [m.statistics.mean_abs for m in members])
        weight = _per_channel(group, members, [_normalised_magnitude(m.weight) for m in members])
        found: list[Candidate] = [("identity", 0.0, torch.ones_like(magnitude))]
        for family in self.families:
            for step in range(self.grid):
                ratio = step / self.grid if family == "duo" else (step + 1) / self.grid
                scales = magnitude**ratio
                if family == "duo":
                    scales = scales / weight ** (1 - ratio)
                found.append((family, ratio, _normalised(scales, group.alive.to(scales.device))))
        return found

    def _losses(self, members: list[_Member], candidates: list[Candidate], held_out: bool = False) -> Tensor:
        """Losses of ``candidates``, rounded by the search tokens, on those or on the held-out tokens."""
        total = torch.zeros(len(candidates), device=members[0].weight.device)
        factors: dict[int, tuple[Tensor, Tensor]] = {}
        for member in members:
            rows = sample_rows(member.weight, self.sample_rows)
            columns = torch.stack([member.columns(scales) for _, _, scales in candidates])
            gram = member.statistics.held_out if held_out else member.statistics.gram
            losses = output_loss(self._errors(member, rows, columns, factors), gram)
            total = total + losses * (len(member.weight) / len(rows))
        return total

    def _errors(
        self, member: _Member, rows: Tensor, columns: Tensor, factors: dict[int, tuple[Tensor, Tensor]]
    ) -> Tensor:
        """What rounding ``rows`` ``(R, K)`` under the input scales ``columns`` ``(C, K)`` adds to them, seen
        from the unscaled input: ``(C, R, K)``."""
        count, (n, k), gram = len(columns), rows.shape, member.statistics.gram
        spread = columns[:, None].expand(count, n, k).reshape(-1, k)
        weight = rows.expand(count, n, k).reshape(-1, k)
        scaled = weight * spread
        blocks = gram_blocks(gram, member.scheme.group(k))
        grid, _ = clipped_grid(scaled, member.scheme, blocks, self.shrinks, spread)
        if self.rounding == "nearest":
            return ((grid.nearest(scaled) - scaled) / spread).reshape(count, n, k)
        if id(gram) not in factors:
            order = visiting_order(gram)
            factors[id(gram)] = order, feedback(gram, order)
        order, factor = factors[id(gram)]
        codes = in_place(compensated_codes(weight, ColumnGrid.of(grid, order, spread), factor, order), order)
        return (grid.decode(codes) / spread - weight).reshape(count, n, k)

    def _best_by_block(
        self, graph: Graph, members: list[_Member], candidates: list[Candidate], search: Tensor
    ) -> int:
        block = BlockObjective(graph, graph.facts[Activations], [m.view for m in members])
        finalists = sorted({0, *torch.argsort(search)[: self.finalists].tolist()})

        def loss(index: int) -> float:
            replaced = {}
            for member in members:
                columns = member.columns(candidates[index][2])[None]
                weight = member.weight + self._errors(member, member.weight, columns, {})[0]
                replaced[member.view.parameter] = weight.t() if member.view.transposed else weight
            return block.loss(replaced)

        return min(finalists, key=loss)


def _members(graph: Graph, observers: list[Observer], group: ScaleGroup) -> Iterator[_Member]:
    statistics, schemes = graph.facts[Statistics], graph.facts[Schemes]
    for observer in observers:
        ids, degree = group.at_input(observer.node)
        ids = ids.to(graph.weights.device)
        for view in observer.linears:
            if view.parameter in schemes:
                weight = view.weight(graph.weights[view.parameter]).float()
                yield _Member(view, weight, schemes[view.parameter], statistics[observer.node], ids, degree)


def _per_channel(group: ScaleGroup, members: list[_Member], columns: list[Tensor]) -> Tensor:
    """Geometric mean, over all columns of all members that share a channel, of a positive statistic."""
    device = members[0].weight.device
    total = torch.zeros(group.channels + 1, device=device)
    count = torch.zeros(group.channels + 1, device=device)
    for member, values in zip(members, columns, strict=True):
        # Columns without a channel (id -1) collect in the extra last element.
        index = torch.where(member.ids >= 0, member.ids, group.channels)
        logs = values.clamp(min=1e-8).log() / member.degree
        total.index_add_(0, index, logs)
        count.index_add_(0, index, torch.ones_like(logs))
    return (total / count.clamp(min=1))[:-1].exp()


def _normalised_magnitude(weight: Tensor) -> Tensor:
    """Mean over rows of ``|w| / max|w of its row|``: ``(K,)``."""
    return (weight.abs() / weight.abs().amax(1, keepdim=True).clamp(min=1e-8)).mean(0)


def _normalised(scales: Tensor, alive: Tensor) -> Tensor:
    used = scales[alive]
    if len(used) == 0:
        return torch.ones_like(scales)
    scales = scales / (used.max() * used.min()).sqrt()
    return torch.where(alive, scales.clamp(1e-4, 1e4), 1.0)
