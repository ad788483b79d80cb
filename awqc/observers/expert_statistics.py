"""What is summed up over the tokens that a router sends to each expert."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TypeVar, cast

import torch
from torch import Tensor

from awqc.memory import Kind, added_rows
from awqc.observers.grams import Gram, SampledGram
from awqc.observers.input_statistics import ALONE, HELD_OUT_EVERY, InputStatistics
from awqc.ranks import Ranks
from awqc.views import ExpertLinear

G = TypeVar("G")


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
        kind: how they are held; unless ``full``, all experts take those of the layer.
        group: input channels that share a scale.
        tokens: rows of all experts that are to come.
    """

    def __init__(
        self,
        view: ExpertLinear,
        least: int,
        device: torch.device,
        kind: Kind = "full",
        group: int = -1,
        tokens: int = 0,
    ) -> None:
        self.view, self.least = view, least
        #: Search tokens of each expert, after :meth:`finish`.
        self.tokens = [0] * view.count
        self.kind = kind
        self.layer = InputStatistics.empty(view.in_features, device, kind, group, tokens)
        self._own: dict[int, InputStatistics] = {}
        self._served: list[InputStatistics] = []
        self._device = device

    def __getitem__(self, index: int) -> InputStatistics:
        """What to judge expert ``index`` by, after :meth:`finish`."""
        return self._served[index]

    @property
    def borrowing(self) -> int:
        """How many experts are searched on the sums of the layer."""
        return sum(self.kind != "full" or tokens < self.least for tokens in self.tokens)

    def add(self, index: int, x: Tensor, held_out: bool, ranks: Ranks = ALONE) -> None:
        """Account for rows ``(tokens, K)`` of expert ``index``."""
        if self.kind != "full":
            self.layer.add(x, held_out, ranks)
            self.tokens[index] += 0 if held_out else len(x)
            return
        if index not in self._own:
            width = self.view.in_features
            empty = InputStatistics.empty(width, self._device)
            self._own[index] = replace(empty, at_once=added_rows(width, expert=True))
        self._own[index].add(x, held_out, ranks)

    def finish(self, ranks: Ranks = ALONE) -> None:
        """Complete all sums and decide which experts use those of the layer."""
        layer = self.layer
        if self.kind != "full":
            layer.finish(ranks)
            shares = [tokens / max(layer.tokens, 1) for tokens in self.tokens]
            self._served = [
                replace(layer, tokens=tokens, share=share)
                for tokens, share in zip(self.tokens, shares, strict=True)
            ]
            return
        for own in self._own.values():
            own.add_up(ranks)
            for mine, others in zip(layer.sums(), own.sums(), strict=True):
                mine += others
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
        done: dict[int, object] = {}

        def once(value: G, by: Tensor, divided: Callable[[G, Tensor], G]) -> G:
            # What several experts share stays shared where they are divided alike.
            if not alike or id(value) not in done:
                done[id(value)] = divided(value, by)
            return cast(G, done[id(value)])

        self._served = [
            replace(
                served,
                gram=once(served.gram, by, folded),
                held_out=once(served.held_out, by, folded),
                mean_abs=once(served.mean_abs, by, torch.div),
            )
            for served, by in zip(self._served, divisors, strict=True)
        ]

    def offload(self) -> None:
        """Hold Gram matrices on the host, those that are shared once."""
        there: dict[int, Gram] = {}

        def host(gram: Gram) -> Gram:
            if isinstance(gram, SampledGram):
                return gram
            return there.setdefault(id(gram), gram.cpu())

        each = [self.layer, *self._served]
        moved = [replace(one, gram=host(one.gram), held_out=host(one.held_out)) for one in each]
        self.layer, self._served = moved[0], moved[1:]


def folded(gram: Gram, divisor: Tensor) -> Gram:
    """The Gram matrix of ``x / divisor``; a new one."""
    if isinstance(gram, SampledGram):
        return gram.fold(divisor)
    divisor = divisor.to(gram.device)
    return gram / (divisor[:, None] * divisor)
