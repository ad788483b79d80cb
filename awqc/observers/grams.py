"""Gram matrices that are too large to be held, as what passes need to know of them.

    H = sum x x^T     its diagonal blocks exactly, one a quantization group, and some tokens x

Losses of one group are exact; losses over all columns are sums over the sample. What needs all of ``H``,
error-compensating rounding, does without.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass
class SampledGram:
    """What is held of a Gram matrix ``(K, K)``.

    Args:
        blocks: ``(G, g, g)`` diagonal blocks over all tokens; a ragged last one is padded with zeros.
        rows: ``(T, K)`` room for a sample of tokens. After a fold that differs by expert, there is one more
            dimension of experts in front of both.
        every: one token in so many is taken into the sample.
        width: ``K``.
        taken, seen: tokens in the sample, and in all.
    """

    blocks: Tensor
    rows: Tensor
    every: int
    width: int
    taken: int = 0
    seen: int = 0

    @staticmethod
    def empty(width: int, group: int, most: int, tokens: int, device: torch.device) -> SampledGram:
        """Over no tokens yet.

        Args:
            group: columns in a block.
            most: tokens in the sample.
            tokens: tokens that are to come.
        """
        group = min(group, width) if group > 0 else width
        # Blocks of whole rows would be the matrix itself.
        group = group if group < width else min(width, 128)
        count = -(-width // group)
        every = max(1, -(-tokens // most))
        rows = torch.zeros(-(-tokens // every), width, device=device)
        return SampledGram(torch.zeros(count, group, group, device=device), rows, every, width)

    def add(self, x: Tensor) -> None:
        """Account for tokens ``(T, K)``, float32."""
        group, count = self.blocks.shape[-1], len(self.blocks)
        first = -self.seen % self.every
        sample = x[first :: self.every][: len(self.rows) - self.taken]
        self.rows[self.taken : self.taken + len(sample)] = sample
        self.taken += len(sample)
        self.seen += len(x)
        padded = torch.nn.functional.pad(x, (0, count * group - self.width))
        split = padded.unflatten(-1, (count, group)).transpose(0, 1)  # (G, T, g)
        self.blocks.baddbmm_(split.mT, split)

    def loss(self, error: Tensor) -> Tensor:
        """Estimate of ``tr(E H E^T)`` for ``E`` ``(..., N, K)``; shape ``(...)``. Where experts differ they
        come first in both."""
        rows = self.rows[..., : self.taken, :]
        if rows.ndim == 2:
            moved = error @ rows.T
        else:
            moved = (error.flatten(1, -2) @ rows.mT).view(*error.shape[:-1], -1)
        return moved.square_().sum((-2, -1)) * (self.seen / max(self.taken, 1))

    def diagonal_blocks(self, group: int) -> Tensor:
        """Blocks of another width, from the sample unless they are those that are held."""
        if group == self.blocks.shape[-1]:
            return self.blocks
        count = -(-self.width // group)
        rows = torch.nn.functional.pad(self.rows[..., : self.taken, :], (0, count * group - self.width))
        split = rows.unflatten(-1, (count, group)).transpose(-3, -2)
        return split.mT @ split * (self.seen / max(self.taken, 1))

    def diagonal(self) -> Tensor:
        """``(K,)``."""
        return self.blocks.diagonal(dim1=-2, dim2=-1).flatten()[: self.width]

    def of(self, experts: int | slice) -> SampledGram:
        """That of some experts, where they differ."""
        return replace(self, blocks=self.blocks[experts], rows=self.rows[experts])

    def fold(self, divisor: Tensor) -> SampledGram:
        """That of ``x / divisor``, exact, for a divisor ``(K,)`` or ``(E, K)``."""
        count, group = self.blocks.shape[-3:-1]
        by = torch.nn.functional.pad(divisor, (0, count * group - self.width), value=1.0)
        by = by.unflatten(-1, (count, group))
        blocks = self.blocks / by[..., :, None] / by[..., None, :]
        return replace(self, blocks=blocks, rows=self.rows / divisor.unsqueeze(-2))


Gram = Tensor | SampledGram
