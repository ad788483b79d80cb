"""What is summed up over the tokens that a router sends to each expert."""

from __future__ import annotations

import torch
from torch import Tensor

from awqc.memory import Kind
from awqc.observers.expert_sums import ExpertSums
from awqc.observers.grams import Gram, SampledGram
from awqc.observers.input_statistics import (
    ALONE,
    HELD_OUT_EVERY,
    BatchStatistics,
    InputStatistics,
    complete,
    fold_gram,
)
from awqc.ranks import Ranks
from awqc.views import ExpertLinear


class ExpertStatistics:
    """Statistics of one activation by the expert that its rows were dispatched to.

    Sums are kept apart by expert and added up for the layer at the end. Where memory does not allow for that,
    all rows are added to those of the layer right away, and every expert is served with these.

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
        #: Search tokens of each expert, after :meth:`finish`; and held-out ones.
        self.tokens, self.held_out_tokens = [0] * view.count, [0] * view.count
        self.kind = kind
        self.layer = InputStatistics.empty(view.in_features, device, kind, group, tokens)
        self._sums: list[ExpertSums] = []
        if kind == "full":
            self._sums = [ExpertSums(view.count, view.in_features, device) for _ in range(2)]
        #: What experts are served with: ``(E, K, K)``, or one for all; and ``(E, K)``.
        self._gram, self._held_out = self.layer.gram, self.layer.held_out
        self._mean_abs = self.layer.mean_abs.expand(view.count, -1)

    def __getitem__(self, index: int) -> InputStatistics:
        """What to judge expert ``index`` by, after :meth:`finish`."""
        gram, held_out = (_of(each, index) for each in (self._gram, self._held_out))
        tokens = self.tokens[index], self.held_out_tokens[index]
        return InputStatistics(gram, held_out, self._mean_abs[index], *tokens, self._share(index))

    def batch(self, part: range) -> BatchStatistics:
        """What to judge the experts numbered ``part`` by, after :meth:`finish`."""
        some = slice(part.start, part.stop)
        shares = torch.tensor([self._share(index) for index in part], device=self._mean_abs.device)
        return BatchStatistics(_of(self._gram, some), _of(self._held_out, some), self._mean_abs[some], shares)

    @property
    def borrowing(self) -> int:
        """How many experts are searched on the sums of the layer."""
        return sum(map(self._borrows, range(self.view.count)))

    def add(self, x: Tensor, counts: list[int], held_out: bool, ranks: Ranks = ALONE) -> None:
        """Account for rows ``(S, K)``, sorted by expert: ``counts`` ``(E,)`` says how many each has."""
        if self._sums:
            self._sums[held_out].add(x, counts, ranks)
        else:
            self.layer.add(x, held_out, ranks)
        tokens = self.held_out_tokens if held_out else self.tokens
        for expert, count in enumerate(counts):
            tokens[expert] += count

    def finish(self, ranks: Ranks = ALONE) -> None:
        """Complete all sums and decide which experts use those of the layer."""
        layer = self.layer
        if not self._sums:
            layer.finish(ranks)
            return
        searched, held_out = self._sums
        self._sums = []
        for sums, gram in ((searched, layer.gram), (held_out, layer.held_out)):
            assert isinstance(gram, Tensor)
            sums.add_up(ranks)
            torch.sum(sums.gram, 0, out=gram)
            complete(sums.gram, ranks)
        layer.mean_abs += searched.magnitude.sum(0)
        layer.tokens, layer.held_out_tokens = sum(self.tokens), sum(self.held_out_tokens)
        layer.finish(ranks)
        self._gram, self._held_out = searched.gram, held_out.gram
        tokens = torch.tensor(self.tokens, device=layer.mean_abs.device)
        self._mean_abs = searched.magnitude / tokens.clamp(min=1)[:, None]
        few = [e for e in range(self.view.count) if self._borrows(e)]
        self._mean_abs[few] = layer.mean_abs
        _lend(layer.gram, searched.gram, few)
        few = [e for e, rows in enumerate(self.held_out_tokens) if rows * HELD_OUT_EVERY < self.least]
        _lend(layer.held_out, held_out.gram, few)

    def fold(self, divisors: Tensor) -> None:
        """Follow the division of each expert's rows by its row of ``divisors`` ``(E, K)``."""
        alike = bool((divisors == divisors[0]).all())

        def followed(gram: Gram) -> Gram:
            if isinstance(gram, Tensor) and gram.ndim == 2:  # that of the layer
                gram = gram.clone() if alike else gram.repeat(len(divisors), 1, 1)
            one = gram.blocks.ndim == 3 if isinstance(gram, SampledGram) else gram.ndim == 2
            return fold_gram(gram, divisors[0] if alike and one else divisors)

        self._gram, self._held_out = followed(self._gram), followed(self._held_out)
        self._mean_abs = self._mean_abs / divisors

    def offload(self) -> None:
        """Hold Gram matrices on the host."""
        shared = self._gram is self.layer.gram
        self.layer.offload()
        if shared:
            self._gram, self._held_out = self.layer.gram, self.layer.held_out
        self._gram, self._held_out = (
            gram if isinstance(gram, SampledGram) else gram.cpu() for gram in (self._gram, self._held_out)
        )

    def _borrows(self, index: int) -> bool:
        return self.kind != "full" or self.tokens[index] < self.least

    def _share(self, index: int) -> float:
        return self.tokens[index] / max(self.layer.tokens, 1) if self._borrows(index) else 1.0


def _lend(gram: Gram, own: Tensor, experts: list[int]) -> None:
    """Let ``gram`` ``(K, K)`` be the one of some experts of ``own`` ``(E, K, K)``."""
    assert isinstance(gram, Tensor)
    own[experts] = gram


def _of(gram: Gram, experts: int | slice) -> Gram:
    """What some experts have of their own; all of what they share."""
    if isinstance(gram, Tensor):
        return gram[experts] if gram.ndim == 3 else gram
    return gram.of(experts) if gram.blocks.ndim == 4 else gram
