"""Search each group's input scale on the exact loss.

Candidates (AWQ, Lin et al. 2023, section 3.2), normalised by ``sqrt(max * min)``:

    activation    s = mean|x| ** r
    duo           s = mean|x| ** r / mean|w| ** (1 - r)

for ``r`` in a grid on [0, 1], and always the identity. The loss of a candidate is ``tr(E H E^T)`` summed
over the group's quantized linears, where ``E`` is the error of quantizing ``W diag(s)`` and undoing ``s``.
Tied channels take the geometric mean. The grid is ranked on a sample of output channels, the best few are
compared on all of them; the winner must beat the identity on held-out tokens, or nothing is applied.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from awqc.calibrate import InputStatistics, Observer, Statistics
from awqc.clipping import clipped_grid
from awqc.context import Context
from awqc.graph import Graph
from awqc.groups import ScaleGroup
from awqc.loss import gram_blocks, output_loss
from awqc.pipeline import Pass
from awqc.quantized import Scheme, minmax_grid
from awqc.scales import Scales
from awqc.schemes import Schemes

Candidate = tuple[str, float, Tensor]


@dataclass(frozen=True)
class _Member:
    """One quantized linear of a group, as the search sees it."""

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
        sample_rows: output channels that rank the grid; 0 for all.
        finalists: candidates compared on all output channels.
        clip: search with the clipped grid that will follow, not with the min-max grid.
    """

    name: ClassVar[str] = "search-scales"
    scope: ClassVar = "stage"
    requires: ClassVar[tuple[type, ...]] = (Statistics, Schemes)
    provides: ClassVar[tuple[type, ...]] = (Scales,)

    grid: int = 20
    families: tuple[Literal["activation", "duo"], ...] = ("activation", "duo")
    sample_rows: int = 128
    finalists: int = 3
    clip: bool = True

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
            curve = self._losses(members, candidates, self.sample_rows)
            row.curve = [
                (family, ratio, float(loss / curve[0])) for (family, ratio, _), loss in zip(candidates, curve, strict=True)
            ]
            best = torch.argsort(torch.stack(curve))[: self.finalists].tolist()
            exact = self._losses(members, [candidates[i] for i in best], 0)
            family, ratio, chosen = candidates[best[int(torch.stack(exact).argmin())]]
            row.gain = self._gain(members, candidates[0][2], chosen)
            if family != "identity" and row.gain > 0:
                scales[group.name] = chosen
                row.family, row.ratio, row.applied = family, ratio, True
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

    def _losses(self, members: list[_Member], candidates: list[Candidate], rows: int) -> list[Tensor]:
        return [
            torch.stack([self._loss(m, scales, m.statistics.gram, rows) for m in members]).sum()
            for _, _, scales in candidates
        ]

    def _gain(self, members: list[_Member], identity: Tensor, chosen: Tensor) -> float:
        """Relative decrease of the loss on held-out tokens."""
        held = [(m, m.statistics.held_out) for m in members]
        before = sum(float(self._loss(m, identity, gram, 0)) for m, gram in held)
        after = sum(float(self._loss(m, chosen, gram, 0)) for m, gram in held)
        return 1 - after / before if before > 0 else 0.0

    def _loss(self, member: _Member, scales: Tensor, gram: Tensor, rows: int) -> Tensor:
        weight = member.weight
        share = 1.0
        if rows and weight.shape[0] > rows:
            step = weight.shape[0] // rows
            share, weight = weight.shape[0] / len(weight[::step]), weight[::step]
        columns = member.columns(scales)
        scaled = weight * columns
        if self.clip:
            # The clip search sees the statistics of the scaled input, as it will after the fold.
            group = member.scheme.group(weight.shape[1])
            blocks = gram_blocks(member.statistics.gram / columns[:, None] / columns, group)
            grid, _ = clipped_grid(scaled, member.scheme, blocks, shrinks=(1.0, 0.9, 0.8, 0.7))
        else:
            grid = minmax_grid(scaled, member.scheme)
        error = (grid.nearest(scaled) - scaled) / columns
        return output_loss(error, gram) * share


def _members(graph: Graph, observers: list[Observer], group: ScaleGroup) -> Iterator[_Member]:
    statistics, schemes = graph.facts[Statistics], graph.facts[Schemes]
    for observer in observers:
        ids, degree = group.at_input(observer.node)
        ids = ids.to(graph.weights.device)
        for view in observer.linears:
            if view.parameter in schemes:
                weight = view.weight(graph.weights[view.parameter]).float()
                yield _Member(weight, schemes[view.parameter], statistics[observer.node], ids, degree)


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

