"""Packed 4-bit weights in the order in which a GPU's tensor cores take them, and the way back.

A weight ``(N, K)`` is cut into blocks of 64 rows by 128 input channels, stored one after the other along K,
then along N. A block is four strips of 16 rows, and a strip is codes, then scales, then zero points:

* Codes: 1024 bytes. For each half of the channels, the 32 lanes of a warp have 16 bytes each: four words, one
  for every 16 channels. A word is a lane's part of an ``m16n8k16`` matrix fragment, eight codes: that of half
  ``j`` of register ``i`` begins at bit ``2 + 4 * ((i + 1) % 4) + 16 * j``. At bits 2 and 6 of a float16 it is
  a number as it is (``marlin_block.cuh``), so that two of four pairs need no shift, and two share one.
* Scales: two bytes for each group and row, rows ``r`` and ``r + 8`` of a strip side by side; zero points: one
  byte each, in the same order.

Rows are padded to 64 with scales of zero, channels to 128 with codes of zero.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from awqc.kernels.qlinear import group_channels

#: Rows and input channels of a block, and strips that it consists of.
ROWS, CHANNELS, STRIPS = 64, 128, 4
#: Bytes of a strip's codes.
CODE_BYTES = ROWS // STRIPS * CHANNELS // 2


def kernel_group(group_size: int, in_features: int) -> int | None:
    """Channels that share a scale within a block: 32, 64 or 128 (also for larger groups, whose scale every
    block repeats); None for groups that blocks cannot hold."""
    group = group_channels(group_size, in_features)
    if group == in_features or group % CHANNELS == 0:
        return CHANNELS
    return group if group in (32, 64) else None


def strip_bytes(group: int) -> int:
    """Bytes of a strip whose kernel group is ``group``."""
    return CODE_BYTES + 3 * ROWS // STRIPS * (CHANNELS // group)


def pack(codes: Tensor, scales: Tensor, zeros: Tensor, group_size: int) -> Tensor:
    """Strips ``(N / 64, K / 128, 4, bytes)`` uint8, both numbers rounded up, on the device of ``codes``.

    Args:
        codes: ``(N, K)`` uint8 below 16.
        scales: ``(N, G)`` float16 or bfloat16.
        zeros: ``(N, G)`` integers, at most 16.
        group_size: with a :func:`kernel_group`.
    """
    n, k = codes.shape
    group = kernel_group(group_size, k)
    assert group is not None, "pack() is for legal group sizes"
    codes = F.pad(codes, (0, -k % CHANNELS, 0, -n % ROWS))
    rows, columns = codes.shape[0] // ROWS, codes.shape[1] // CHANNELS
    # row: block, strip, +8, lane / 4; channel: block, half, step, +8, lane % 4, low or high
    parts = codes.view(rows, 4, 2, 8, columns, 2, 4, 2, 4, 2)
    words = torch.zeros(rows, columns, 4, 2, 8, 4, 4, dtype=torch.int32, device=codes.device)
    for high in range(2):
        for upper in range(2):
            for eighth in range(2):
                part = parts[:, :, eighth, :, :, :, :, upper, :, high].permute(0, 3, 1, 4, 2, 6, 5)
                words |= _rotated(part, _bit(eighth + 2 * upper, high))
    strips = [words.view(rows, columns, STRIPS, -1).view(torch.uint8)]
    for values in (scales.view(torch.int16), zeros.to(torch.uint8)):
        spread = _per_block(values, group_size, group, n, k, columns)
        ordered = spread.view(rows, 4, 2, 8, columns, -1).permute(0, 4, 1, 5, 3, 2)
        strips.append(ordered.reshape(rows, columns, STRIPS, -1).view(torch.uint8))
    return torch.cat(strips, -1)


def unpack(packed: Tensor, n: int, k: int, group_size: int, scale_dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Codes ``(n, k)`` uint8, scales ``(n, G)`` of ``scale_dtype``, zeros ``(n, G)`` uint8: bit for bit."""
    rows, columns, _, _ = packed.shape
    group = kernel_group(group_size, k)
    assert group is not None, "unpack() is for what pack() made"
    words = packed[..., :CODE_BYTES].contiguous().view(torch.int32).view(rows, columns, 4, 2, 8, 4, 4)
    codes = torch.empty(rows, 4, 2, 8, columns, 2, 4, 2, 4, 2, dtype=torch.uint8, device=packed.device)
    for high in range(2):
        for upper in range(2):
            for eighth in range(2):
                bit = _bit(eighth + 2 * upper, high)
                low = words >> bit & 15
                if bit > 28:  # wraps around
                    low = (words >> bit & (1 << 32 - bit) - 1) | (words & (1 << bit - 28) - 1) << 32 - bit
                codes[:, :, eighth, :, :, :, :, upper, :, high] = low.permute(0, 2, 4, 1, 3, 6, 5)
    tables = []
    end = CODE_BYTES + 2 * ROWS // STRIPS * (CHANNELS // group)
    for part, dtype in ((packed[..., CODE_BYTES:end], scale_dtype), (packed[..., end:], torch.uint8)):
        table = part.contiguous().view(dtype).view(rows, columns, 4, -1, 8, 2)
        table = table.permute(0, 2, 5, 4, 1, 3).reshape(rows * ROWS, -1)
        per_group = max(group_channels(group_size, k) // CHANNELS, 1)
        if group_channels(group_size, k) == k:
            per_group = columns
        groups = -(-k // group_channels(group_size, k))
        tables.append(table[:n, ::per_group][:, :groups].contiguous())
    return codes.view(rows * ROWS, -1)[:n, :k].contiguous(), *tables


def _bit(register: int, half: int) -> int:
    """Where the code of half a register begins in a word."""
    return 16 * half + 2 + 4 * ((register + 1) % 4)


def _rotated(code: Tensor, bit: int) -> Tensor:
    """``code`` at ``bit`` of a 32-bit word; bits beyond the last re-enter at the first."""
    code = code.to(torch.int32)
    if bit <= 28:
        return code << bit
    return (code << bit) | (code >> 32 - bit)


def _per_block(values: Tensor, group_size: int, group: int, n: int, k: int, columns: int) -> Tensor:
    """``(N, G)`` as one value for each kernel group: ``(rows, columns * CHANNELS / group)``, padded."""
    channels = group_channels(group_size, k)
    if channels == k:
        values = values.expand(n, columns)
    elif channels > group:
        values = values.repeat_interleave(channels // group, 1)[:, :columns]
    wanted = columns * (CHANNELS // group)
    return F.pad(values, (0, wanted - values.shape[1], 0, -n % ROWS))
