"""What is summed up over the tokens that a router sends to each expert."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from awqc.input_statistics import ALONE, HELD_OUT_EVERY, InputStatistics
from awqc.ranks import Ranks
from awqc.views import ExpertLinear


class ExpertStatistics:
    """Statistics of one activation by the expert that its rows were dispatched to.

    Sums are kept apart by expert, allocated when its first row comes, and added up for the layer at the end.
    Their memory is bounded by who owns sums: an expert that is to own none can add its rows to the layer's
    right away, as it is served with these anyway when it has too few.

    Args:
        view: the linears that read the activation; of several, any.
        least: an expert with fewer search tokens takes the sums of the whole layer for its own, and one with
            fewer than ``least / HELD_OUT_EVERY`` held-out tokens is judged by those of the layer.
        device: where the sums are.
    """

    def __init__(self, view: ExpertLinear, least: int, device: torch.device) -> None:
        self.view, self.least = view, least
        #: Search tokens of each expert, after :meth:`finish`.
        self.tokens = [0] * view.count
        self.layer = InputStatistics.empty(view.in_features, device)
        self._own: dict[int, InputStatistics] = {}
        self._served: list[InputStatistics] = []
        self._device = device

    def __getitem__(self, index: int) -> InputStatistics:
        """What to judge expert ``index`` by, after :meth:`finish`."""
        return self._served[index]

    @property
    def borrowing(self) -> int:
        """How many experts are searched on the sums of the layer."""
        return sum(tokens < self.least for tokens in self.tokens)

    def add(self, index: int, x: Tensor, held_out: bool, ranks: Ranks = ALONE) -> None:
        """Account for rows ``(tokens, K)`` of expert ``index``."""
        if index not in self._own:
            self._own[index] = InputStatistics.empty(self.view.in_features, self._device)
        self._own[index].add(x, held_out, ranks)

    def finish(self, ranks: Ranks = ALONE) -> None:
        """Complete all sums and decide which experts use those of the layer."""
        layer = self.layer
        for own in self._own.values():
            layer.gram += own.gram
            layer.held_out += own.held_out
            layer.mean_abs += own.mean_abs
            layer.tokens += own.tokens
            layer.held_out_tokens += own.held_out_tokens
        for statistics in (layer, *self._own.values()):
            statistics.finish(ranks)
        nothing = replace(layer, tokens=0, held_out_tokens=0)
        for index in range(self.view.count):
            own = self._own.pop(index, nothing)
            self.tokens[index] = own.tokens
            if own.tokens < self.least:
                share = own.tokens / max(layer.tokens, 1)
                own = replace(own, gram=layer.gram, mean_abs=layer.mean_abs, share=share)
            if own.held_out_tokens * HELD_OUT_EVERY < self.least:
                own = replace(own, held_out=layer.held_out)
            self._served.append(own)

    def fold(self, divisors: Tensor) -> None:
        """Follow the division of each expert's rows by its row of ``divisors`` ``(E, K)``."""
        alike = bool((divisors == divisors[0]).all())
        done: dict[int, Tensor] = {}

        def divided(tensor: Tensor, by: Tensor) -> Tensor:
            # What several experts share stays shared where they are divided alike.
            if not alike or id(tensor) not in done:
                done[id(tensor)] = tensor / by
            return done[id(tensor)]

        self._served = [
            replace(
                served,
                gram=divided(served.gram, by[:, None] * by),
                held_out=divided(served.held_out, by[:, None] * by),
                mean_abs=divided(served.mean_abs, by),
            )
            for served, by in zip(self._served, divisors, strict=True)
        ]
