"""What kernels are told of a weight in planes."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from awqc.kernels.hardware import Hardware
from awqc.kernels.triton_call import Target
from awqc.kernels.triton_tile import Tile
from tests.kernels.triton_weights import weight_of


@pytest.mark.parametrize(
    ("k", "group_size", "width", "group", "run"),
    [
        (1024, 128, 64, 128, 2),
        (1024, 64, 64, 64, 1),
        (1024, 32, 32, 32, 1),
        (1024, 256, 64, 256, 4),
        (384, 96, 32, 96, 1),
        (1024, -1, 64, 1024, 4),
        (1000, -1, 64, 1024, 4),  # padded channels belong to the only group
    ],
)
def test_groups_in_planes(k: int, group_size: int, width: int, group: int, run: int) -> None:
    weight = weight_of(100, k, group_size)
    assert weight.packed.shape[1:] == (128, width)
    assert (weight.group, weight.run) == (group, run)


def test_operands_say_what_is_whole() -> None:
    at = Target(132, ptx=True, dependent=True)
    assert weight_of(100, 1024).operands(at)["whole_k"]
    found = weight_of(100, 1000, -1).operands(at)
    assert not found["whole_k"]
    assert (found["n"], found["k"], found["rows"], found["groups"]) == (100, 1000, 128, 1)
    assert found["ptx"] is True


def test_fits_what_a_block_may_have() -> None:
    small = Hardware("some", "cuda", 100, (8, 0), 48 << 10)
    fitted = weight_of(100, 1024, scales=torch.float32).fitting(Tile(128, 128, 8, 4, 1), small)
    assert fitted.stages == 2
    assert fitted.block_m < 128
