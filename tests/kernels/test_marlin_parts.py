"""Memory for sums that blocks leave for each other: what a kernel is told of it, and how much there is."""

from __future__ import annotations

import pytest
import torch

from awqc.kernels.marlin_parts import TAG, Parts
from awqc.kernels.marlin_wide import TILE_TOKENS, WideTiling


def test_flags_lie_behind_sums_that_are_aligned_for_them() -> None:
    parts = Parts(1024, 3)
    memory = parts.allocate(torch.device("cpu"))
    assert memory.nbytes == parts.nbytes == 1024 + 24
    sums, flags, tag = parts.arguments(memory)
    assert (sums, flags, tag) == (memory.data_ptr(), memory.data_ptr() + 1024, TAG)
    assert flags % 8 == 0


def test_a_raised_flag_fits_into_the_kernel_s_parameter() -> None:
    assert 0 <= TAG < 2**63


def test_nothing_is_asked_for_where_nothing_is_left() -> None:
    assert Parts().nbytes == 0
    assert Parts().allocate(torch.device("cpu")).numel() == 0


@pytest.mark.parametrize("row_blocks", [2, 4])
@pytest.mark.parametrize("tokens", TILE_TOKENS)
@pytest.mark.parametrize("split", [1, 2, 4, 8])
def test_blocks_that_share_channels_leave_a_tile_each_and_a_flag_for_who_adds(
    split: int, tokens: int, row_blocks: int
) -> None:
    tiling = WideTiling(tokens, split, 3, row_blocks)
    parts = tiling.parts(9, tokens + 1)
    blocks = -(-9 // row_blocks) * 2 * split
    assert tiling.blocks(9, tokens + 1) == blocks
    if split == 1:
        assert parts == Parts()
        return
    assert parts.sums == blocks * row_blocks * 64 * tokens * 4
    assert parts.flags == blocks * row_blocks * min(split, tokens // 8)
