"""Observe the inputs of a stage's linears over every calibration token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from awqc.context import Context
from awqc.graph import Graph
from awqc.memory import Kind, added_rows
from awqc.needs import StageNeeds
from awqc.observers.activations import Activations
from awqc.observers.expert_sums import adding_work
from awqc.observers.input_statistics import InputStatistics, gram_block
from awqc.observers.stages import Observer, Observers, Stages
from awqc.observers.statistics import Statistics
from awqc.pipeline import Pass
from awqc.quantization.loss import GATE_ROWS, output_loss
from awqc.quantization.matrices import batches, stacked
from awqc.quantization.schemes import Schemes
from awqc.quantized import minmax_grid, sample_rows
from awqc.views import ExpertLinear
from awqc.work import Work, gram_rows, matrices_of, quantized_views, rows


@dataclass(frozen=True)
class Calibrate(Pass):
    """Gram matrix and mean magnitude of each activation that the stage's linears read."""

    name: ClassVar[str] = "calibrate"
    scope: ClassVar = "stage"
    requires: ClassVar[tuple[type, ...]] = (Observers, Stages, Schemes)
    provides: ClassVar[tuple[type, ...]] = (Statistics,)

    def work(self, graph: Graph, observers: Sequence[Observer], samples: int, kind: Kind = "full") -> Work:
        work, schemes, needs = Work(), graph.facts[Schemes], graph.facts.get(StageNeeds)
        together = needs is not None and needs.together
        for observer in observers:
            views = {type(view): view for view in observer.views}
            for view in views.values():  # statistics are shared by all that read the activation
                k, tokens, block = view.in_features, rows(view) * samples, gram_block(view.in_features)
                if isinstance(view, ExpertLinear) and kind == "full":
                    work += adding_work(view.count, k, rows(view), samples, together)
                    continue
                times = samples if kind == "sampled" else -(-tokens // max(added_rows(k), rows(view)))
                work["grams"] += tokens * k * (k + block if kind != "sampled" else 2 * gram_block(0))
                work["calls"] += samples + times * (4 + -(-k // block))
        for _, view, _ in quantized_views(observers, schemes):
            n, k, count = view.out_features, view.in_features, matrices_of(view)
            work["flops"] += count * 4 * min(n, GATE_ROWS) * k * gram_rows(k, kind)
            work["streamed"] += count * 4 * n * k
            work["calls"] += len(batches(view)) * 50
        return work

    def run(self, graph: Graph, context: Context) -> None:
        assert context.stage is not None
        graph.facts.drop(Statistics)  # of a run that ended halfway
        statistics = graph.facts[Statistics] = graph.facts[Activations].observe(context.stage)
        statistics.tell(context.stage, context.report)
        schemes = graph.facts[Schemes]
        for observer in context.stage.observers:
            by_expert = statistics.by_expert.get(observer.node)
            if observer.group is not None:
                found = statistics[observer.node] if by_expert is None else by_expert.layer
                group = context.report.groups[observer.group.name]
                group.tokens, group.held_out_tokens = found.tokens, found.held_out_tokens
            for view in observer.views:
                row = context.report.linears[view.parameter]
                if by_expert is not None and isinstance(view, ExpertLinear):
                    row.expert_tokens, row.borrowing = by_expert.tokens, by_expert.borrowing
                if view.parameter not in schemes:
                    continue
                # The yardstick of everything that follows: round-to-nearest, before anything is changed.
                losses = []
                for part in batches(view):
                    held_out = statistics.batch(observer.node, view, part).held_out
                    weight = sample_rows(stacked(view, graph.weights, part), GATE_ROWS)
                    error = minmax_grid(weight, schemes[view.parameter]).nearest(weight) - weight
                    losses.append(torch.stack([output_loss(each, held_out) for each in (weight, error)]))
                energy, total = map(sum, torch.cat(losses, 1).tolist())
                row.energy, row.nearest_error = energy, total / (energy or 1.0)
                row.steps = [("nearest", row.nearest_error)]
                found = statistics[observer.node] if by_expert is None else by_expert.layer
                row.input = _about(found)


def _about(statistics: InputStatistics) -> dict[str, float]:
    """What the report says of an activation."""
    magnitude = statistics.mean_abs
    largest, channel = magnitude.max(0)
    return {
        "tokens": statistics.tokens,
        "median": float(magnitude.median()),
        "largest": float(largest),
        "channel": int(channel),
    }
