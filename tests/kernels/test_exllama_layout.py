"""Codes in words along K: where each goes, the stride, and the way back."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from awqc.kernels.exllama_layout import (
    COLUMNS,
    pack_groups,
    pack_words,
    row_stride,
    unpack_groups,
    unpack_words,
)


def codes_of(n: int, k: int) -> torch.Tensor:
    return torch.randint(0, 16, (n, k), generator=torch.Generator().manual_seed(n + k)).to(torch.uint8)


def test_a_word_holds_eight_consecutive_channels() -> None:
    codes = codes_of(5, 70)
    words = pack_words(codes)
    assert (words.shape, words.dtype) == ((12, row_stride(5)), torch.int32)
    for feature, channel in ((0, 0), (4, 1), (1, 3), (2, 4), (3, 7), (0, 8), (4, 69)):
        row, place = channel // 8, channel % 8
        nibble = 2 * place if place < 4 else 2 * (place - 4) + 1
        assert words[row, feature].item() >> 4 * nibble & 15 == codes[feature, channel]
    assert not words[:, 5:].any()
    assert not unpack_words(words, 5, 96)[:, 70:].any()


@settings(deadline=None)
@given(n=st.integers(1, 300), k=st.integers(1, 300))
def test_unpacking_gives_the_codes_back(n: int, k: int) -> None:
    codes = codes_of(n, k)
    assert torch.equal(unpack_words(pack_words(codes), n, k), codes)


@pytest.mark.parametrize("n", [1, 256, 4000, 4096, 14336])
def test_rows_are_whole_lines_that_start_in_different_channels(n: int) -> None:
    stride = row_stride(n)
    assert stride >= n
    assert 4 * stride % 128 == 0
    assert 4 * stride % 512 != 0
    assert stride >= -(-n // COLUMNS) * COLUMNS


@pytest.mark.parametrize("shape", [(1, 1), (256, 5), (300, 3)])
def test_groups_are_transposed_and_padded(shape: tuple[int, int]) -> None:
    values = torch.randn(shape).half()
    packed = pack_groups(values)
    assert packed.shape == (shape[1], row_stride(shape[0]))
    assert torch.equal(unpack_groups(packed, shape[0]), values)
