"""Codes in planes: where each goes, and the way back."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from awqc.kernels.planes import (
    PLANES,
    ROWS,
    pack_groups,
    pack_planes,
    plane_width,
    unpack_groups,
    unpack_planes,
)


def codes_of(*shape: int) -> torch.Tensor:
    return torch.randint(0, 16, shape, generator=torch.Generator().manual_seed(sum(shape))).to(torch.uint8)


def test_a_word_holds_the_codes_of_four_planes() -> None:
    codes = codes_of(3, 300)
    words = pack_planes(codes, 32)
    assert (words.shape, words.dtype) == ((3, ROWS, 32), torch.int16)
    for row, channel in ((0, 0), (2, 31), (1, 32), (2, 127), (0, 128), (1, 299)):
        block, plane, word = channel // 128, channel % 128 // 32, channel % 32
        assert words[block, row, word].item() >> 4 * plane & 15 == codes[row, channel]
    assert not words[:, 3:].any()
    assert not unpack_planes(words, ROWS, 3 * PLANES * 32)[:, 300:].any()


@settings(deadline=None)
@given(
    n=st.integers(1, 300),
    k=st.integers(1, 700),
    width=st.sampled_from([16, 32, 64]),
    experts=st.integers(0, 2),
)
def test_unpacking_gives_the_codes_back(n: int, k: int, width: int, experts: int) -> None:
    codes = codes_of(experts, n, k) if experts else codes_of(n, k)
    assert torch.equal(unpack_planes(pack_planes(codes, width), n, k), codes)


@pytest.mark.parametrize("shape", [(1, 1), (128, 5), (130, 3), (2, 70, 4)])
def test_groups_are_transposed_and_padded(shape: tuple[int, ...]) -> None:
    values = torch.randn(shape).half()
    packed = pack_groups(values)
    assert packed.shape[-2] == shape[-1]
    assert packed.shape[-1] % ROWS == 0
    assert packed.is_contiguous()
    assert torch.equal(unpack_groups(packed, shape[-2]), values)


@pytest.mark.parametrize(
    ("k", "group_size", "width"),
    [
        (4096, 128, 64),
        (4096, -1, 64),
        (4096, 64, 64),
        (4096, 32, 32),
        (4096, 96, 32),
        (4096, 16, 16),
        # Blocks of 256 channels would pad 1408 to 1536.
        (1408, 128, 32),
        # No width divides the channels: the least padding.
        (300, 128, 16),
        (48, 128, 16),
        (4096, 24, None),
        (1000, 1000, 64),
    ],
)
def test_planes_lie_within_groups_and_pad_little(k: int, group_size: int, width: int | None) -> None:
    assert plane_width(k, group_size) == width
