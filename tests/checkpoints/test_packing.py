from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from awqc.checkpoints.packing import pack_bits, pack_words, unpack_bits, unpack_words
from tests.checkpoints.specification import read_bits, write_natural


def random_codes(n: int, k: int, bits: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 1 << bits, (n, k), generator=generator).to(torch.uint8)


@given(st.integers(1, 5), st.integers(1, 5), st.sampled_from([4, 8]), st.integers(0, 99))
def test_words_follow_the_specification_and_come_back(n: int, words: int, bits: int, seed: int) -> None:
    codes = random_codes(n, words * 32 // bits, bits, seed)
    packed = pack_words(codes, bits)
    assert packed.dtype == torch.int32
    assert packed.numpy().tolist() == write_natural(codes.numpy(), bits).tolist()
    assert torch.equal(unpack_words(packed, bits), codes)


@given(st.integers(1, 5), st.integers(1, 40), st.integers(2, 8), st.integers(0, 99))
def test_bits_follow_the_specification_and_come_back(n: int, k: int, bits: int, seed: int) -> None:
    codes = random_codes(n, k, bits, seed)
    packed = pack_bits(codes, bits)
    assert packed.shape == (n, -(-k // 8) * bits)
    assert read_bits(packed.numpy(), bits, k).tolist() == codes.tolist()
    assert torch.equal(unpack_bits(packed, bits, k), codes)


@pytest.mark.parametrize("bits", [4, 8])
def test_strides_of_dimensions_of_size_one_do_not_matter(bits: int) -> None:
    """Zero points of whole rows are packed transposed: ``(N, 1)`` becomes ``(1, N)``, strides (1, 1)."""
    zeros = torch.arange(8, dtype=torch.uint8).view(8, 1)
    words = pack_words(zeros.t(), bits)
    assert words.tolist() == pack_words(zeros.view(1, 8), bits).tolist()
    assert unpack_words(words.t().contiguous().t(), bits).tolist() == [list(range(8))]
