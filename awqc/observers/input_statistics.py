"""What is summed up over the calibration tokens of one activation: Gram matrices and mean magnitudes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from awqc.memory import SAMPLED_ROWS, Kind, added_rows
from awqc.observers.grams import Gram, SampledGram
from awqc.ranks import Ranks

ALONE = Ranks()
#: One sample in this many is held out from every search, to judge what the search proposes.
HELD_OUT_EVERY = 8
#: Least width of the column blocks of which only the upper triangle of a Gram matrix is computed, and into
#: how many a wide matrix is cut: each is a product of its own, and half of that on the diagonal is in vain.
_GRAM_BLOCK, _GRAM_BLOCKS = 256, 8


def gram_block(width: int) -> int:
    """Columns of a Gram matrix ``(width, width)`` that are computed at a time."""
    return max(_GRAM_BLOCK, -(-width // (_GRAM_BLOCKS * _GRAM_BLOCK)) * _GRAM_BLOCK)


@dataclass
class InputStatistics:
    """What is known of one activation ``x`` over the calibration tokens.

    Args:
        gram: ``(K, K)`` sum of ``x x^T`` over the tokens that searches may use, float32; it may be on the
            host, or a :class:`~awqc.observers.grams.SampledGram` where a limit of memory does not allow for
            it.
        held_out: ``(K, K)`` the same over tokens that searches never see.
        mean_abs: ``(K,)`` mean of ``|x|`` over the search tokens.
        tokens, held_out_tokens: how many of each.
        share: what share of ``gram`` is due to these tokens, where it is borrowed from a larger set.
        at_once: rows that are added up together.
    """

    gram: Gram
    held_out: Gram
    mean_abs: Tensor
    tokens: int = 0
    held_out_tokens: int = 0
    share: float = 1.0
    at_once: int = 1
    #: Rows that are still to be added up: search tokens, and those held out.
    _waiting: tuple[list[Tensor], list[Tensor]] = field(default_factory=lambda: ([], []), repr=False)

    @staticmethod
    def empty(
        width: int, device: torch.device, kind: Kind = "full", group: int = -1, tokens: int = 0
    ) -> InputStatistics:
        """Sums over no tokens of an activation of ``width`` channels.

        Args:
            kind: how Gram matrices are held.
            group: input channels that share a scale, where they are sampled.
            tokens: how many are to come, where they are sampled.
        """

        def gram(share: float) -> Gram:
            if kind == "sampled":
                count = math.ceil(tokens * share)
                return SampledGram.empty(width, group, SAMPLED_ROWS, count, device)
            return torch.zeros(width, width, dtype=torch.float32, device=device)

        held_out = 1 / HELD_OUT_EVERY
        mean = torch.zeros(width, dtype=torch.float32, device=device)
        at_once = added_rows(width) if kind != "sampled" else 1
        grams = gram(1.0 if kind != "sampled" else 1 - held_out), gram(held_out)
        return InputStatistics(*grams, mean, at_once=at_once)

    def add(self, x: Tensor, held_out: bool, ranks: Ranks = ALONE) -> None:
        """Account for activations ``(tokens, K)``; of the Gram matrix only for the blocks of this rank."""
        waiting = self._waiting[held_out]
        waiting.append(x.float())
        if held_out:
            self.held_out_tokens += len(x)
        else:
            self.tokens += len(x)
        if sum(map(len, waiting)) >= self.at_once:
            self.add_up(ranks)

    def add_up(self, ranks: Ranks = ALONE) -> None:
        """Account for what is waiting for more rows, so that the sums are those of all."""
        for gram, waiting in zip((self.gram, self.held_out), self._waiting, strict=True):
            if not waiting:
                continue
            x = torch.cat(waiting) if len(waiting) > 1 else waiting[0]
            waiting.clear()
            _add_gram(gram, x, ranks)
            if gram is self.gram:
                self.mean_abs += x.abs().sum(0)

    def finish(self, ranks: Ranks = ALONE) -> None:
        """Complete the symmetric halves and turn sums into means."""
        self.add_up(ranks)
        for gram in (self.gram, self.held_out):
            if isinstance(gram, SampledGram):
                continue  # whole in every rank
            ranks.add(gram)  # where one rank has a block, the others have zeros
            block = gram_block(len(gram))
            for i in range(block, len(gram), block):
                gram[i:, i - block : i] = gram[i - block : i, i:].T
        self.mean_abs /= max(self.tokens, 1)

    def sums(self) -> list[Tensor]:
        """Everything that adds up over tokens, in the order of the fields: what workers that have seen
        different tokens add to each other's before :meth:`finish`."""
        grams = (self.gram, self.held_out)
        return [g.blocks if isinstance(g, SampledGram) else g for g in grams] + [self.mean_abs]

    def offload(self) -> None:
        """Hold Gram matrices on the host."""
        self.gram, self.held_out = (
            gram if isinstance(gram, SampledGram) else gram.cpu() for gram in (self.gram, self.held_out)
        )

    def fold(self, divisor: Tensor) -> None:
        """The statistics of ``x / divisor``: ``H -> diag(1/s) H diag(1/s)``, exact."""
        self.gram, self.held_out = (_fold(gram, divisor) for gram in (self.gram, self.held_out))
        self.mean_abs /= divisor


def _fold(gram: Gram, divisor: Tensor) -> Gram:
    if isinstance(gram, SampledGram):
        return gram.fold(divisor)
    divisor = divisor.to(gram.device)
    return gram.div_(divisor[:, None]).div_(divisor)


def _add_gram(gram: Gram, x: Tensor, ranks: Ranks) -> None:
    if isinstance(gram, SampledGram):
        gram.add(x)
        return
    block = gram_block(len(gram))
    for i in ranks.mine(range(0, len(gram), block)):
        gram[i : i + block, i:].addmm_(x[:, i : i + block].T, x[:, i:])


def split_sample(x: Tensor, index: int, count: int) -> Sequence[tuple[Tensor, bool]]:
    """Rows of one sample with whether they are held out; a lone sample gives up its last rows."""
    if count == 1:
        cut = max(1, len(x) - max(1, len(x) // HELD_OUT_EVERY))
        return [(x[:cut], False), (x[cut:], True)] if cut < len(x) else [(x, False), (x, True)]
    every = min(HELD_OUT_EVERY, count)
    return [(x, index % every == every - 1)]
