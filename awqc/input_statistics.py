"""What is summed up over the calibration tokens of one activation: Gram matrices and mean magnitudes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from awqc.ranks import Ranks

ALONE = Ranks()
#: One sample in this many is held out from every search, to judge what the search proposes.
HELD_OUT_EVERY = 8
#: Width of the column blocks of which only the upper triangle of a Gram matrix is computed.
GRAM_BLOCK = 256


@dataclass
class InputStatistics:
    """What is known of one activation ``x`` over the calibration tokens.

    Args:
        gram: ``(K, K)`` sum of ``x x^T`` over the tokens that searches may use, float32.
        held_out: ``(K, K)`` the same over tokens that searches never see.
        mean_abs: ``(K,)`` mean of ``|x|`` over the search tokens.
        tokens, held_out_tokens: how many of each.
        share: what share of ``gram`` is due to these tokens, where it is borrowed from a larger set.
    """

    gram: Tensor
    held_out: Tensor
    mean_abs: Tensor
    tokens: int = 0
    held_out_tokens: int = 0
    share: float = 1.0

    @staticmethod
    def empty(width: int, device: torch.device) -> InputStatistics:
        """Sums over no tokens of an activation of ``width`` channels."""

        def zeros(*size: int) -> Tensor:
            return torch.zeros(size, dtype=torch.float32, device=device)

        return InputStatistics(zeros(width, width), zeros(width, width), zeros(width))

    def add(self, x: Tensor, held_out: bool, ranks: Ranks = ALONE) -> None:
        """Account for activations ``(tokens, K)``; of the Gram matrix only for the blocks of this rank."""
        x = x.float()
        if held_out:
            _add_gram(self.held_out, x, ranks)
            self.held_out_tokens += len(x)
        else:
            _add_gram(self.gram, x, ranks)
            self.mean_abs += x.abs().sum(0)
            self.tokens += len(x)

    def finish(self, ranks: Ranks = ALONE) -> None:
        """Complete the symmetric halves and turn sums into means."""
        for gram in (self.gram, self.held_out):
            ranks.add(gram)  # where one rank has a block, the others have zeros
            for i in range(GRAM_BLOCK, len(gram), GRAM_BLOCK):
                gram[i:, i - GRAM_BLOCK : i] = gram[i - GRAM_BLOCK : i, i:].T
        self.mean_abs /= max(self.tokens, 1)

    def fold(self, divisor: Tensor) -> None:
        """The statistics of ``x / divisor``: ``H -> diag(1/s) H diag(1/s)``, exact."""
        for gram in (self.gram, self.held_out):
            gram.div_(divisor[:, None]).div_(divisor)
        self.mean_abs /= divisor


def _add_gram(gram: Tensor, x: Tensor, ranks: Ranks) -> None:
    for i in ranks.mine(range(0, len(gram), GRAM_BLOCK)):
        gram[i : i + GRAM_BLOCK, i:].addmm_(x[:, i : i + GRAM_BLOCK].T, x[:, i:])


def split_sample(x: Tensor, index: int, count: int) -> Sequence[tuple[Tensor, bool]]:
    """Rows of one sample with whether they are held out; a lone sample gives up its last rows."""
    if count == 1:
        cut = max(1, len(x) - max(1, len(x) // HELD_OUT_EVERY))
        return [(x[:cut], False), (x[cut:], True)] if cut < len(x) else [(x, False), (x, True)]
    every = min(HELD_OUT_EVERY, count)
    return [(x, index % every == every - 1)]
