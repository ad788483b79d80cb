"""Packed 4-bit codes in planes: the order that Triton kernels consume without moving anything.

A block holds ``4 * width`` input channels of every row. Word ``i`` of a row is an int16 with four codes,
those of channels ``i``, ``width + i``, ``2 * width + i`` and ``3 * width + i`` of the block, lowest bits
first. One shift and mask of a ``(rows, width)`` tile of words is therefore the tile of codes of ``width``
consecutive channels, and two neighbouring words are two codes side by side in one 32-bit register, as the
operands of a matrix instruction want them. A tile of rows is contiguous in memory.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from awqc.kernels.qlinear import group_channels

#: Codes in a word.
PLANES = 4
#: Widths to choose from, best first: wider planes mean fewer and larger tiles.
WIDTHS = (64, 32, 16)
#: Rows are padded to a multiple of this, so that kernels load whole tiles.
ROWS = 128
#: Padding of the channels that a wider plane is worth, as a share of them.
_PADDING = 1 / 32


def plane_width(in_features: int, group_size: int) -> int | None:
    """Width of the planes of a weight: planes lie within groups. None if no width divides the group."""
    group = group_channels(group_size, in_features)
    widths = [w for w in WIDTHS if group == in_features or group % w == 0]
    if not widths:
        return None
    padding = {w: -in_features % (PLANES * w) for w in widths}
    return next(
        (w for w in widths if padding[w] <= _PADDING * in_features), min(widths, key=padding.__getitem__)
    )


def pack_planes(codes: Tensor, width: int) -> Tensor:
    """Codes ``(..., N, K)`` uint8 below 16 as words ``(..., blocks, rows, width)`` int16, zero-padded."""
    n, k = codes.shape[-2:]
    padded = F.pad(codes, (0, -k % (PLANES * width), 0, -n % ROWS))
    planes = padded.unflatten(-1, (-1, PLANES, width)).transpose(-4, -3)
    low = planes[..., 0, :] | planes[..., 1, :] << 4
    high = planes[..., 2, :] | planes[..., 3, :] << 4
    return torch.stack([low, high], -1).view(torch.int16).squeeze(-1)


def unpack_planes(words: Tensor, n: int, k: int) -> Tensor:
    """The codes ``(..., n, k)`` uint8 that :func:`pack_planes` was given."""
    octets = words.unsqueeze(-1).view(torch.uint8)
    low, high = octets[..., 0], octets[..., 1]
    planes = torch.stack([low & 15, low >> 4, high & 15, high >> 4], -2)
    return planes.transpose(-4, -3).flatten(-3)[..., :n, :k].contiguous()


def pack_groups(values: Tensor) -> Tensor:
    """Per-group values ``(..., N, G)`` as ``(..., G, rows)``, zero-padded: consecutive rows side by side."""
    return F.pad(values, (0, 0, 0, -values.shape[-2] % ROWS)).transpose(-2, -1).contiguous()


def unpack_groups(values: Tensor, n: int) -> Tensor:
    """The values ``(..., n, G)`` that :func:`pack_groups` was given."""
    return values.transpose(-2, -1)[..., :n, :].contiguous()
