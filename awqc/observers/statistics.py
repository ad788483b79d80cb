"""The statistics of a stage's activations, a fact that searches rest on."""

from __future__ import annotations

import torch
from torch import Tensor, fx

from awqc.memory import ROUNDED_AT_ONCE, Kind
from awqc.observers.expert_statistics import ExpertStatistics
from awqc.observers.input_statistics import ALONE, BatchStatistics, InputStatistics
from awqc.observers.stages import Stage
from awqc.quantization.matrices import Matrix
from awqc.ranks import Ranks
from awqc.report import Report
from awqc.scaleflow.groups import ScaleGroup
from awqc.views import ExpertLinear, Linear

#: What the report says of statistics that are not held as Gram matrices on the device.
_HELD: dict[Kind, str] = {
    "full": "",
    "offloaded": "Gram matrices are on the host between passes",
    "sampled": "of Gram matrices only the blocks of quantization groups and a sample of tokens are held, so "
    "scales are searched on these, clipping is exact, and weights are rounded to the nearest",
}


class Statistics(dict[fx.Node, InputStatistics]):
    """Statistics of a stage's activations that linears read, by observed node; and in :attr:`by_expert`
    those of activations that experts read, each expert its own rows.

    Args:
        kind: how Gram matrices are held.
        at_once: elements of weights that compensated rounding handles at once.
    """

    def __init__(self, kind: Kind = "full", at_once: int = ROUNDED_AT_ONCE) -> None:
        super().__init__()
        self.by_expert: dict[fx.Node, ExpertStatistics] = {}
        self.kind, self.at_once = kind, at_once

    def of(self, node: fx.Node, matrix: Matrix) -> InputStatistics:
        """What to judge ``matrix``, which reads ``node``, by."""
        return self[node] if matrix.index is None else self.by_expert[node][matrix.index]

    def batch(self, node: fx.Node, view: Linear | ExpertLinear, part: range) -> BatchStatistics:
        """What to judge the matrices of ``view``, which reads ``node``, numbered ``part`` by; a linear is one
        matrix."""
        if isinstance(view, ExpertLinear):
            return self.by_expert[node].batch(part)
        one = self[node]
        shares = torch.tensor([one.share], device=one.mean_abs.device)
        return BatchStatistics(one.gram, one.held_out, one.mean_abs[None], shares)

    def finish(self, node: fx.Node, ranks: Ranks = ALONE) -> list[InputStatistics]:
        """Complete the sums of ``node``: those of linears, those of the layer whose experts read it."""
        found = []
        if node in self:
            self[node].finish(ranks)
            found.append(self[node])
        if node in self.by_expert:
            self.by_expert[node].finish(ranks)
            found.append(self.by_expert[node].layer)
        return found

    def offload(self) -> None:
        """Hold all Gram matrices on the host."""
        self.kind, self.at_once = "offloaded", ROUNDED_AT_ONCE
        for one in self.values():
            one.offload()
        for by_expert in self.by_expert.values():
            by_expert.offload()

    def tell(self, stage: Stage, report: Report) -> None:
        """Tell ``report`` how the statistics of ``stage`` are held."""
        for observer in stage.observers:
            if observer.group is not None:
                report.groups[observer.group.name].statistics = self.kind
            by_expert = self.by_expert.get(observer.node)
            held = _HELD[self.kind]
            if self.kind == "offloaded" and by_expert is not None and by_expert.kind != "full":
                held += ", and experts share those of their layer"
            if held:
                report.note("calibrate", f"inputs of {observer.in_features} channels: {held}")

    def fold(self, group: ScaleGroup, scales: Tensor) -> None:
        """Follow the fold of ``scales`` into ``group``."""
        for node, statistics in self.items():
            divisor = group.divisor(node, scales)
            if divisor is not None:
                by = divisor.at({}).reshape(-1)
                statistics.fold(by.expand(statistics.mean_abs.shape).float())
        for node, by_expert in self.by_expert.items():
            if node in group.values:
                by_expert.fold(column_scales(*group.at_experts(by_expert.view), scales).float())


def column_scales(ids: Tensor, degree: float, scales: Tensor) -> Tensor:
    """What divides each column whose channel is ``ids`` (of any shape), 1 where that is -1."""
    padded = torch.cat([scales, scales.new_ones(1)])  # id -1 picks the last element
    return padded[ids.to(scales.device)] ** degree
