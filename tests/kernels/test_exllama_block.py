"""Blocks of ``exllama.cu``: shares of the channels, and shared memory."""

from __future__ import annotations

import pytest

from awqc.kernels.exllama_block import Block, chunks_of_a_step


@pytest.mark.parametrize(
    ("rows", "chunks", "span", "limit", "rounds", "shares"),
    [
        # 32 blocks of 128 columns on 132 processors that hold 4 each.
        (4096, 128, 4, 227 << 10, 1, 16),
        (128256, 128, 4, 227 << 10, 1, 1),
        # Never more than there are spans.
        (32, 3, 1, 227 << 10, 1, 3),
        (32, 5, 4, 227 << 10, 1, 2),
        # 112 blocks for each share: 4 leave 80 places of 528 empty, 14 in three rounds 16 of 1584.
        (14336, 128, 4, 227 << 10, 1, 4),
        (14336, 128, 4, 227 << 10, 3, 14),
        # A share of the activations fits a quarter of the memory; 1002 * 6 blocks are twelve rounds.
        (128256, 1024, 4, 64 << 10, 1, 6),
    ],
)
def test_shares_fill_the_device_and_fit(
    rows: int, chunks: int, span: int, limit: int, rounds: int, shares: int
) -> None:
    block = Block(tokens=1, columns=4, warps=8, blocks=4, rounds=rounds)
    assert block.shares(1, rows, chunks, span, 132, limit) == shares
    assert block.blocks * (block.shared_bytes(chunks, span, shares) + 1024) <= limit + 1024


@pytest.mark.parametrize(
    ("group", "span"), [(32, 1), (64, 2), (96, 1), (128, 4), (4096, 4), (1000, 4), (30, 1)]
)
def test_groups_are_whole_spans(group: int, span: int) -> None:
    assert chunks_of_a_step(group) == span
