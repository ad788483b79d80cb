"""Blocks of ``exllama.cu``: shares of the channels, and shared memory."""

from __future__ import annotations

import pytest

from awqc.kernels.exllama_block import Block


@pytest.mark.parametrize(
    ("rows", "chunks", "limit", "shares"),
    [
        # 32 blocks of 128 columns on 132 processors that hold 4 each.
        (4096, 128, 227 << 10, 16),
        (128256, 128, 227 << 10, 1),
        # Never more than chunks.
        (32, 3, 227 << 10, 3),
        # 112 blocks for each share: 4 leave 80 places of 528 empty.
        (14336, 128, 227 << 10, 4),
        # A share of the activations fits a quarter of the memory; 1002 * 5 blocks are ten rounds.
        (128256, 1024, 64 << 10, 5),
    ],
)
def test_shares_fill_the_device_and_fit(rows: int, chunks: int, limit: int, shares: int) -> None:
    block = Block(tokens=1, columns=4, warps=8, blocks=4)
    assert block.shares(1, rows, chunks, 132, limit) == shares
    assert block.blocks * (block.shared_bytes(chunks, shares) + 1024) <= limit + 1024
