"""Tiles that know their expert, and shares of K: what an op's result hides."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from awqc.kernels.qexperts_triton import TritonExperts, multiply
from awqc.kernels.triton_tile import Tile
from awqc.kernels.triton_weight import Weight
from tests.kernels.test_qexperts_triton import DEVICE, assert_close, experts, rows


@pytest.mark.parametrize("programs", [1, 8])
@pytest.mark.parametrize("block_m", [8, 16])
@pytest.mark.parametrize(
    ("count", "n", "k", "group_size", "ends"),
    [
        (
            4,
            48,
            128,
            32,
            [3, 3, 30, 31],
        ),  # none of the second's, several tiles of the third's, four of nobody's
        (3, 130, 320, 64, [0, 0, 35]),
        (5, 40, 200, -1, [7, 14, 21, 28, 35]),
        (1, 32, 64, 32, [0]),  # no rows of anybody's
    ],
)
def test_every_tile_and_every_number_of_shares(
    programs: int, block_m: int, count: int, n: int, k: int, group_size: int, ends: list[int]
) -> None:
    weight, x, offsets = experts(count, n, k, group_size), rows(35, k).half(), torch.tensor(ends)
    tensors, _ = TritonExperts.pack(weight.codes, weight.scales, weight.zeros, None, 4, group_size)
    moved = {name: t.to(DEVICE) for name, t in tensors.items() if t is not None}
    tile = Tile(block_m, 32, warps=2, stages=2, programs=programs)
    stacked = Weight(**moved, n=n, k=k, group_size=group_size)
    got = multiply(x.to(DEVICE), offsets.int().to(DEVICE), stacked, tile)
    assert_close(got, x, offsets, weight, group_size)
    assert not got[ends[-1] :].any()
