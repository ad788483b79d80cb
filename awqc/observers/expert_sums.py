"""Sums over the rows of each expert of a layer, as many experts at once as a product takes."""

from __future__ import annotations

from itertools import accumulate

import torch
from torch import Tensor

from awqc.memory import added_rows
from awqc.observers.input_statistics import ALONE, add_gram
from awqc.ranks import Ranks

#: Products of all experts in which rows that have waited are added up, spread as routers do; for plans.
ROUNDS = 3
#: One expert in so many must still have rows for all to be added up together, padded with zeros.
_TOGETHER = 16


class ExpertSums:
    """Gram matrices and magnitudes of the rows of E experts.

    Args:
        count: ``E``.
        width: ``K``.
        device: where the sums are.
        together: whether a product takes all experts at once: it saves launches, not arithmetic.

    Attributes:
        gram: ``(E, K, K)`` sums of ``x x^T``, the upper triangle until they are completed.
        magnitude: ``(E, K)`` sums of ``|x|``.
        tokens: rows of each expert.
    """

    def __init__(self, count: int, width: int, device: torch.device, together: bool | None = None) -> None:
        self.gram = torch.zeros(count, width, width, device=device)
        self.magnitude = torch.zeros(count, width, device=device)
        self.tokens = [0] * count
        self._together = device.type == "cuda" if together is None else together
        #: Rows of an expert that are added up together. While they are, there are half as many waiting, these
        #: joined, and those that are multiplied.
        self._at_once = max(1, added_rows(width, expert=True) // 2)
        self._waiting: list[tuple[Tensor, list[int]]] = []
        self._rows = 0

    def add(self, x: Tensor, counts: list[int], ranks: Ranks = ALONE) -> None:
        """Account for ``x`` ``(S, K)``, sorted by expert, ``counts`` ``(E,)`` rows of each."""
        if self._rows + len(x) > self._at_once * len(counts):
            self.add_up(ranks)
        self._waiting.append((x.float(), counts))
        self._rows += len(x)
        self.tokens = [sum(pair) for pair in zip(self.tokens, counts, strict=True)]

    def add_up(self, ranks: Ranks = ALONE) -> None:
        """Account for what is waiting for more rows."""
        if not self._rows:
            return
        x, order, counts = self._joined()
        starts, done = list(accumulate(counts, initial=0)), 0
        while self._together and _TOGETHER * sum(count > done for count in counts) >= len(counts):
            places = torch.tensor(starts[:-1])[:, None] + done + torch.arange(self._at_once)
            there = places < torch.tensor(starts[1:])[:, None]
            # The last row is zeros.
            chosen = torch.where(there, order[places.clamp(max=len(order) - 1)], len(x) - 1)
            self._account(self.gram, self.magnitude, x[chosen.to(x.device)], ranks)
            done += self._at_once
        where = order.to(x.device)
        for expert, count in enumerate(counts):
            if count > done:
                rows = x[where[starts[expert] + done : starts[expert + 1]]]
                self._account(self.gram[expert], self.magnitude[expert], rows, ranks)

    def _joined(self) -> tuple[Tensor, Tensor, list[int]]:
        """Everything that waits, with a row of zeros behind; its rows in the order of experts, on the host;
        and how many each has."""
        waiting, self._waiting, self._rows = self._waiting, [], 0
        x = torch.cat([*(rows for rows, _ in waiting), waiting[0][0].new_zeros(1, self.gram.shape[-1])])
        numbers = torch.arange(len(self.tokens))
        experts = torch.cat([numbers.repeat_interleave(torch.tensor(counts)) for _, counts in waiting])
        together = [sum(each) for each in zip(*(counts for _, counts in waiting), strict=True)]
        return x, experts.argsort(stable=True), together

    @staticmethod
    def _account(gram: Tensor, magnitude: Tensor, rows: Tensor, ranks: Ranks) -> None:
        add_gram(gram, rows, ranks)
        magnitude += rows.abs().sum(-2)


def joins(count: int, width: int, tokens: int) -> int:
    """How often rows that wait are added up, of ``tokens`` rows of ``count`` experts of ``width`` channels,
    for plans."""
    return -(-tokens // (count * max(1, added_rows(width, expert=True) // 2)))
