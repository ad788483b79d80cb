"""What is summed up over the calibration tokens of one activation: Gram matrices and mean magnitudes."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
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
            if isinstance(gram, SampledGram):
                gram.add(x)
            else:
                add_gram(gram, x, ranks)
            if gram is self.gram:
                self.mean_abs += x.abs().sum(0)

    def finish(self, ranks: Ranks = ALONE) -> None:
        """Complete the symmetric halves and turn sums into means."""
        self.add_up(ranks)
        for gram in (self.gram, self.held_out):
            if not isinstance(gram, SampledGram):  # that is whole in every rank
                complete(gram, ranks)
        self.mean_abs /= max(self.tokens, 1)

    def offload(self) -> None:
        """Hold Gram matrices on the host."""
        self.gram, self.held_out = (
            gram if isinstance(gram, SampledGram) else gram.cpu() for gram in (self.gram, self.held_out)
        )

    def fold(self, divisor: Tensor) -> None:
        """The statistics of ``x / divisor``: ``H -> diag(1/s) H diag(1/s)``, exact."""
        self.gram, self.held_out = (fold_gram(gram, divisor) for gram in (self.gram, self.held_out))
        self.mean_abs /= divisor


@dataclass(frozen=True)
class BatchStatistics:
    """What B matrices that are handled at once are judged by.

    Args:
        gram, held_out: ``(K, K)`` where all have the same, else ``(B, K, K)``.
        mean_abs: ``(B, K)``.
        shares: ``(B,)``; see :class:`InputStatistics`.
    """

    gram: Gram
    held_out: Gram
    mean_abs: Tensor
    shares: Tensor


def fold_gram(gram: Gram, divisor: Tensor) -> Gram:
    """The Gram matrix ``(..., K, K)`` of ``x / divisor``, ``(..., K)``; in place where it is held whole."""
    if isinstance(gram, SampledGram):
        return gram.fold(divisor)
    divisor = divisor.to(gram.device)
    return gram.div_(divisor[..., :, None]).div_(divisor[..., None, :])


def add_gram(gram: Tensor, x: Tensor, ranks: Ranks) -> None:
    """Account for rows ``(T, K)`` in ``gram`` ``(K, K)``, or for ``(E, T, K)`` in ``(E, K, K)``: in the upper
    triangle, for the blocks of this rank."""
    width = gram.shape[-1]
    block = gram_block(width)
    for i in ranks.mine(range(0, width, block)):
        rows, left, right = gram[..., i : i + block, i:], x[..., i : i + block].mT, x[..., i:]
        if gram.ndim == 2:
            rows.addmm_(left, right)
        else:
            rows.baddbmm_(left, right)


def complete(gram: Tensor, ranks: Ranks) -> None:
    """Make ``gram`` ``(..., K, K)`` whole, of the upper triangles that all ranks have added up."""
    ranks.add(gram)  # where one rank has a block, the others have zeros
    width = gram.shape[-1]
    block = gram_block(width)
    for i in range(block, width, block):
        gram[..., i:, i - block : i] = gram[..., i - block : i, i:].mT


def split_sample(x: Tensor, index: int, count: int) -> Sequence[tuple[Tensor, bool]]:
    """Rows of one sample with whether they are held out; a lone sample gives up its last rows."""
    if count == 1:
        cut = max(1, len(x) - max(1, len(x) // HELD_OUT_EVERY))
        return [(x[:cut], False), (x[cut:], True)] if cut < len(x) else [(x, False), (x, True)]
    every = min(HELD_OUT_EVERY, count)
    return [(x, index % every == every - 1)]


def split_experts(
    x: Tensor, counts: list[int], index: int, count: int
) -> Iterator[tuple[Tensor, list[int], bool]]:
    """As :func:`split_sample` does, of rows sorted by expert and how many each has; of a lone sample, every
    expert gives up its last rows."""
    if count > 1:
        yield from ((rows, counts, held_out) for rows, held_out in split_sample(x, index, count))
        return
    found: dict[bool, list[Tensor]] = {False: [], True: []}
    for rows in x.split(counts):
        for some, held_out in split_sample(rows, index, count):
            found[held_out].append(some)
    yield from ((torch.cat(parts), [len(part) for part in parts], which) for which, parts in found.items())
