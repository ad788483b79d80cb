"""Activations as bulk copies take them."""

from __future__ import annotations

import pytest
import torch

from awqc.kernels.aligned import aligned


def test_rows_that_are_aligned_stay_where_they_are() -> None:
    rows = torch.randn(3, 24).half()
    assert aligned(rows) is rows


@pytest.mark.parametrize("channels", [1, 7, 9, 20])
def test_channels_grow_by_zeros(channels: int) -> None:
    rows = torch.randn(5, channels).half()
    found = aligned(rows)
    assert found.shape == (5, -(-channels // 8) * 8)
    assert torch.equal(found[:, :channels], rows)
    assert found[:, channels:].count_nonzero() == 0


def test_rows_that_begin_elsewhere_are_copied() -> None:
    rows = torch.randn(4 * 16 + 1).half()[1:].view(4, 16)
    assert rows.data_ptr() % 16
    found = aligned(rows)
    assert found.data_ptr() % 16 == 0
    assert torch.equal(found, rows)
