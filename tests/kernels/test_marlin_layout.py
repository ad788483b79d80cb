"""The packed form of the tensor-core kernels: exact both ways, and in the order that its text states."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from awqc.kernels import marlin_layout as layout


def parts(n: int, k: int, group_size: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    groups = -(-k // (k if group_size == -1 else min(group_size, k)))
    codes = torch.randint(0, 16, (n, k), generator=generator).to(torch.uint8)
    scales = torch.rand(n, groups, generator=generator).half()
    zeros = torch.randint(0, 16, (n, groups), generator=generator).to(torch.uint8)
    return codes, scales, zeros


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(1, 150),
    k=st.integers(1, 40).map(lambda i: 8 * i),
    group_size=st.sampled_from([-1, 32, 64, 128, 256]),
    bfloat16=st.booleans(),
    seed=st.integers(0, 999),
)
def test_unpack_is_the_exact_inverse(n: int, k: int, group_size: int, bfloat16: bool, seed: int) -> None:
    codes, scales, zeros = parts(n, k, group_size, seed)
    dtype = torch.bfloat16 if bfloat16 else torch.float16
    scales = scales.to(dtype)
    packed = layout.pack(codes, scales, zeros, group_size)
    for found, expected in zip(
        layout.unpack(packed, n, k, group_size, dtype), (codes, scales, zeros), strict=True
    ):
        assert found.dtype == expected.dtype
        assert torch.equal(found, expected)


@pytest.mark.parametrize(("group_size", "group"), [(32, 32), (64, 64), (128, 128), (256, 128), (-1, 128)])
def test_the_order_is_the_one_described(group_size: int, group: int) -> None:
    """Read back one element at a time, as the text says, with nothing of the packer's own arithmetic."""
    codes, scales, zeros = parts(128, 512, group_size)
    packed = layout.pack(codes, scales, zeros, group_size)
    assert packed.shape == (2, 4, 4, 1024 + 48 * (128 // group))
    generator = torch.Generator().manual_seed(1)
    for _ in range(300):
        row, channel = (int(torch.randint(0, most, (), generator=generator)) for most in (128, 512))
        strip = packed[row // 64, channel // 128, row % 64 // 16]
        r, c = row % 16, channel % 128
        lane = r % 8 * 4 + c % 8 // 2
        at = c // 64 * 512 + lane * 16 + c % 64 // 16 * 4
        word = int.from_bytes(bytes(strip[at : at + 4].tolist()), "little")
        register = r // 8 + 2 * (c % 16 // 8)
        bit = 16 * (c % 2) + (6, 10, 14, 2)[register]
        rotated = (word >> bit | word << 32 - bit) & 15
        assert rotated == codes[row, channel]
        pair = 2 * (c // group * 8 + r % 8) + r // 8
        g = 0 if group_size == -1 else channel // group_size
        assert (
            strip[1024:].view(torch.uint8)[: 32 * (128 // group)].view(torch.float16)[pair] == scales[row, g]
        )
        assert strip[1024 + 32 * (128 // group) + pair] == zeros[row, g]


@pytest.mark.parametrize(
    ("group_size", "channels", "expected"),
    [
        (128, 4096, 128),
        (-1, 100, 128),
        (256, 1024, 128),
        (64, 64, 128),
        (64, 100, 64),
        (32, 96, 32),
        (96, 192, None),
        (16, 64, None),
        (192, 384, None),
    ],
)
def test_groups_that_strips_can_hold(group_size: int, channels: int, expected: int | None) -> None:
    assert layout.kernel_group(group_size, channels) == expected


def test_padding_adds_nothing() -> None:
    packed = layout.pack(*parts(5, 40, 32), 32)
    codes, scales, zeros = layout.unpack(packed, 64, 128, 32, torch.float16)
    assert not codes[5:].any()
    assert not codes[:, 40:].any()
    assert not scales[5:].any()
    assert not scales[:, 2:].any()
    assert not zeros[5:].any()
