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
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from awqc.context import Context
from awqc.errors import ConfigError
from awqc.graph import Graph
from awqc.memory import Kind
from awqc.observers.activations import Activations
from awqc.observers.grams import SampledGram
from awqc.observers.stages import Observer
from awqc.observers.statistics import Statistics
from awqc.pipeline import Pass
from awqc.quantization.block_objective import BlockObjective
from awqc.quantization.clipping import clipped_grid
from awqc.quantization.loss import gram_blocks, output_loss
from awqc.quantization.members import Member, Part, parts
from awqc.quantization.rounding import ColumnGrid, compensated_codes, feedback, in_place, visiting_order
from awqc.quantization.scales import Scales
from awqc.quantization.schemes import Schemes
from awqc.quantized import sample_rows
from awqc.ranks import Ranks
from awqc.report import GroupRow
from awqc.work import Work, gram_rows, matrices_of, quantized_views

Candidate = tuple[str, float, Tensor]


class _Outcome(NamedTuple):
    """What was tried on a part of a group and what came out: its channels, names of the candidates and their
    search losses, the best with its scales, and the held-out losses of the identity and of the best."""

    channels: Tensor
    labels: list[tuple[str, float]]
    search: Tensor
    best: int
    chosen: Tensor
    before: float
    after: float

    @property
    def applied(self) -> bool:
        """Whether the best candidate is worth folding."""
        return self.best > 0 and self.after < self.before

    @property
    def scales(self) -> Tensor:
        """``(C,)``; 1 if nothing is to be folded."""
        return self.chosen if self.applied else torch.ones_like(self.chosen)


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
            sampled = count * (candidates + 2) * min(n, self.sample_rows or n)
            work["clipped"] += 2 * sampled * k * len(self.shrinks)  # input scales are divided out as well
            work["flops"] += 2 * sampled * k * gram_rows(k, kind)
            work["moved"] += 16 * sampled * k
            work["streamed"] += count * 12 * n * k
            work["calls"] += count * (6 * candidates + 100)
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
            found = self._outcomes(graph, context.ranks, parts(graph, observers, group))
            if not found:
                continue
            _report(context.report.groups[group.name], found)
            if any(outcome.applied for outcome in found):
                chosen = torch.ones(group.channels, device=graph.weights.device)
                for outcome in found:
                    chosen[outcome.channels] = outcome.scales
                scales[group.name] = chosen
                row = context.report.groups[group.name]
                row.scale_range = float(chosen.min()), float(chosen.max())
        graph.facts[Scales] = scales

    def _outcomes(self, graph: Graph, ranks: Ranks, found: list[Part]) -> list[_Outcome]:
        """The outcome of each part; many parts are divided among processes, else the members of each are."""
        if ranks.count > 1 and self.objective == "block":
            raise ConfigError(
                "objective='block' compares samples that one process holds: use the objective 'linear', or "
                "one process"
            )
        if len(found) < ranks.count:
            return [self._search(graph, part, ranks) for part in found]
        return ranks.map(lambda part: self._search(graph, part, Ranks()), found, graph.weights.device)

    def _search(self, graph: Graph, part: Part, ranks: Ranks) -> _Outcome:
        candidates = self.candidates(part)
        search = self._losses(part, candidates, ranks)
        best = int(search.argmin())
        if self.objective == "block":
            best = self._best_by_block(graph, part, candidates, search)
        gate = [candidates[0], candidates[best]]
        before, after = self._losses(part, gate, ranks, held_out=True).tolist()
        labels = [(family, ratio) for family, ratio, _ in candidates]
        return _Outcome(part.channels, labels, search, best, candidates[best][2], before, after)

    def candidates(self, part: Part) -> list[Candidate]:
        """The identity, then every family at every ratio; ``(C,)`` each."""
        magnitude = _per_channel(part, [m.statistics.mean_abs for m in part.members])
        weight = _per_channel(part, [_normalised_magnitude(m.weight) for m in part.members])
        found: list[Candidate] = [("identity", 0.0, torch.ones_like(magnitude))]
        for family in self.families:
            for step in range(self.grid):
                ratio = step / self.grid if family == "duo" else (step + 1) / self.grid
                scales = magnitude**ratio
                if family == "duo":
                    scales = scales / weight ** (1 - ratio)
                found.append((family, ratio, _normalised(scales, part.alive)))
        return found

    def _losses(
        self, part: Part, candidates: list[Candidate], ranks: Ranks, held_out: bool = False
    ) -> Tensor:
        """Losses of ``candidates``, rounded by the search tokens, on those or on the held-out tokens."""
        factors: dict[int, tuple[Tensor, Tensor]] = {}

        def of(member: Member) -> Tensor:
            rows = sample_rows(member.weight, self.sample_rows)
            columns = torch.stack([member.columns(scales) for _, _, scales in candidates])
            gram = member.statistics.held_out if held_out else member.statistics.gram
            losses = output_loss(self._errors(member, rows, columns, factors), gram)
            return losses * (len(member.weight) / len(rows)) * member.statistics.share

        total = torch.zeros(len(candidates), device=part.channels.device)
        for losses in ranks.map(of, part.members, part.channels.device):
            total = total + losses
        return total

    def _errors(
        self, member: Member, rows: Tensor, columns: Tensor, factors: dict[int, tuple[Tensor, Tensor]]
    ) -> Tensor:
        """What rounding ``rows`` ``(R, K)`` under the input scales ``columns`` ``(C, K)`` adds to them, seen
        from the unscaled input: ``(C, R, K)``."""
        count, (n, k), gram = len(columns), rows.shape, member.statistics.gram
        spread = columns[:, None].expand(count, n, k).reshape(-1, k)
        weight = rows.expand(count, n, k).reshape(-1, k)
        scaled = weight * spread
        blocks = gram_blocks(gram, member.scheme.group(k)).to(rows.device)
        grid, _ = clipped_grid(scaled, member.scheme, blocks, self.shrinks, spread)
        if self.rounding == "nearest" or isinstance(gram, SampledGram):
            return ((grid.nearest(scaled) - scaled) / spread).reshape(count, n, k)
        if id(gram) not in factors:
            here = gram.to(rows.device)
            order = visiting_order(here)
            factors[id(gram)] = order, feedback(here, order)
        order, factor = factors[id(gram)]
        codes = in_place(compensated_codes(weight, ColumnGrid.of(grid, order, spread), factor, order), order)
        return (grid.decode(codes) / spread - weight).reshape(count, n, k)

    def _best_by_block(self, graph: Graph, part: Part, candidates: list[Candidate], search: Tensor) -> int:
        block = BlockObjective(graph, graph.facts[Activations], [m.matrix.view for m in part.members])
        finalists = sorted({0, *torch.argsort(search)[: self.finalists].tolist()})

        def loss(index: int) -> float:
            replaced: dict[str, Tensor] = {}
            for member in part.members:
                view, columns = member.matrix.view, member.columns(candidates[index][2])[None]
                if view.parameter not in replaced:
                    replaced[view.parameter] = graph.weights[view.parameter].clone()
                whole = view.weight(replaced[view.parameter])
                weight = whole if member.matrix.index is None else whole[member.matrix.index]
                weight += self._errors(member, member.weight, columns, {})[0]
            return block.loss(replaced)

        return min(finalists, key=loss)


def _per_channel(part: Part, columns: list[Tensor]) -> Tensor:
    """Geometric mean, over all columns of all members that share a channel, of a positive statistic."""
    device, channels = part.channels.device, len(part.channels)
    total = torch.zeros(channels + 1, device=device)
    count = torch.zeros(channels + 1, device=device)
    for member, values in zip(part.members, columns, strict=True):
        # Columns without a channel (id -1) collect in the extra last element.
        index = torch.where(member.ids >= 0, member.ids, channels)
        logs = values.clamp(min=1e-8).log() / member.degree
        total.index_add_(0, index, logs)
        count.index_add_(0, index, torch.ones_like(logs))
    return (total / count.clamp(min=1))[:-1].exp()


def _report(row: GroupRow, found: list[_Outcome]) -> None:
    """State the outcome of a group: of its only part, or of all parts together."""
    labels = found[0].labels
    losses = torch.stack([outcome.search for outcome in found]).sum(0)
    row.curve = [(*label, float(loss / losses[0])) for label, loss in zip(labels, losses, strict=True)]
    applied = [outcome for outcome in found if outcome.applied]
    if applied:
        # Of several parts, what most of them chose.
        (row.family, row.ratio), _ = Counter(labels[outcome.best] for outcome in applied).most_common(1)[0]
    before = sum(outcome.before for outcome in found)
    after = sum(o.after if o.applied or len(found) == 1 else o.before for o in found)
    row.gain = 1 - after / max(before, torch.finfo(torch.float32).tiny)


def _normalised_magnitude(weight: Tensor) -> Tensor:
    """Mean over rows of ``|w| / max|w of its row|``: ``(K,)``."""
    return (weight.abs() / weight.abs().amax(1, keepdim=True).clamp(min=1e-8)).mean(0)


def _normalised(scales: Tensor, alive: Tensor) -> Tensor:
    used = scales[alive]
    if len(used) == 0:
        return torch.ones_like(scales)
    scales = scales / (used.max() * used.min()).sqrt()
    return torch.where(alive, scales.clamp(1e-4, 1e4), 1.0)
