"""Sums over the rows of each expert of a layer, as many experts at once as a product takes."""

from __future__ import annotations

from itertools import accumulate

import torch
from torch import Tensor

from awqc.memory import FLOAT, added_rows
from awqc.observers.input_statistics import ALONE, add_gram, gram_block
from awqc.ranks import Ranks
from awqc.work import Work

#: For plans, as counted: rows of the experts that have most, one in :data:`_TOGETHER` apart, over the mean,
#: with a router that nobody trained to spread them; and ops for each product of all experts, for each of one
#: expert, and for the order of all rows, beside those for the blocks of Gram matrices.
_SKEW, _ROUND_OPS, _ALONE_OPS, _ORDER_OPS = 4, 11, 4, 10
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
        self._at_once = _at_once(width)
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
        bounds = torch.tensor(starts, device=x.device)
        numbers = torch.arange(self._at_once, device=x.device)
        while self._together and _TOGETHER * sum(count > done for count in counts) >= len(counts):
            places = bounds[:-1, None] + done + numbers
            there = places < bounds[1:, None]
            # The last row is zeros.
            chosen = torch.where(there, order[places.clamp(max=len(order) - 1)], len(x) - 1)
            self._account(self.gram, self.magnitude, x[chosen], ranks)
            done += self._at_once
        for expert, count in enumerate(counts):
            if count > done:
                rows = x[order[starts[expert] + done : starts[expert + 1]]]
                self._account(self.gram[expert], self.magnitude[expert], rows, ranks)

    def _joined(self) -> tuple[Tensor, Tensor, list[int]]:
        """Everything that waits, with a row of zeros behind; its rows in the order of experts; and how many
        each has. The order is found where the rows are: a GPU needs not wait for it, nor do threads of the
        host for each other."""
        waiting, self._waiting, self._rows = self._waiting, [], 0
        x = torch.cat([*(rows for rows, _ in waiting), waiting[0][0].new_zeros(1, self.gram.shape[-1])])
        numbers = torch.arange(len(self.tokens), device=x.device).repeat(len(waiting))
        each = torch.tensor([counts for _, counts in waiting], device=x.device).flatten()
        experts = numbers.repeat_interleave(each, output_size=len(x) - 1)
        together = [sum(some) for some in zip(*(counts for _, counts in waiting), strict=True)]
        return x, experts.argsort(stable=True), together

    @staticmethod
    def _account(gram: Tensor, magnitude: Tensor, rows: Tensor, ranks: Ranks) -> None:
        add_gram(gram, rows, ranks)
        magnitude += rows.abs().sum(-2)


def _at_once(width: int) -> int:
    """Rows of an expert that are added up together. While they are, there are half as many waiting, these
    joined, and those that are multiplied."""
    return max(1, added_rows(width, expert=True) // 2)


def joins(count: int, width: int, rows: int, samples: int) -> int:
    """How often rows that wait are added up, of so many ``samples``, each of ``rows`` rows of ``count``
    experts of ``width`` channels; for plans. A sample is not divided."""
    return -(-samples // max(1, count * _at_once(width) // rows))


def adding_work(count: int, width: int, rows: int, samples: int, together: bool) -> Work:
    """What it takes to add up the rows of experts; arguments as for :func:`joins` and :class:`ExpertSums`."""
    block, times = gram_block(width), joins(count, width, rows, samples)
    blocks, alone = -(-width // block), count
    work, products = Work({"calls": samples + times * _ORDER_OPS}), 1
    if together:
        # The rows of every expert are padded to those that are added up at once; what few have more comes
        # after it, expert by expert.
        padded = count * _at_once(width)
        products = -(-_SKEW * rows * samples // (times * padded))
        alone = max(count // _TOGETHER - 1, 0)
        work["calls"] += times * products * (_ROUND_OPS + blocks)
        work["grams"] += times * products * padded * width * (width + block)
    else:
        work["grams"] += samples * rows * width * (width + block)
    work["calls"] += times * alone * (_ALONE_OPS + blocks)
    # Of the upper triangle, each time.
    work["streamed"] += times * products * count * FLOAT * width * (width + block)
    return work
