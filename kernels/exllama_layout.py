"""Packed 4-bit weights in words along K, columns side by side, and the way back.

Word ``(r, n)`` is an int32 with the codes of input channels ``8 r`` to ``8 r + 7`` of output feature ``n``:
channel ``i`` in the low half of byte ``i`` and channel ``4 + i`` in its high half. So a row of words is read
by consecutive threads at consecutive addresses, and ``word & 0x0f0f0f0f`` is four codes, each in a byte.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

#: Input channels of a chunk, to which channels are padded; groups are whole chunks.
CHANNELS = 32
#: Output features to which rows of words are padded.
COLUMNS = 256
#: Words after each row. A stride of a multiple of 512 bytes would send the rows of a column to the same few
#: memory channels of an AMD GPU.
_SKEW = 32


def row_stride(out_features: int) -> int:
    """Words from one row to the next."""
    return out_features + -out_features % COLUMNS + _SKEW


def pack_words(codes: Tensor) -> Tensor:
    """Codes ``(N, K)`` uint8 below 16 as words ``(channels / 8, stride)`` int32, zero-padded."""
    n, k = codes.shape
    halves = F.pad(codes, (0, -k % CHANNELS)).unflatten(1, (-1, 2, 4))
    octets = halves[:, :, 0] | halves[:, :, 1] << 4
    words = octets.contiguous().view(torch.int32).squeeze(-1)
    return F.pad(words.t(), (0, row_stride(n) - n)).contiguous()


def unpack_words(words: Tensor, n: int, k: int) -> Tensor:
    """The codes ``(n, k)`` uint8 that :func:`pack_words` was given."""
    octets = words[:, :n].t().contiguous().unsqueeze(-1).view(torch.uint8)
    return torch.stack([octets & 15, octets >> 4], 2).flatten(1)[:, :k].contiguous()


def pack_groups(values: Tensor) -> Tensor:
    """Per-group values ``(N, G)`` as ``(G, stride)``, zero-padded like the words."""
    return F.pad(values.t(), (0, row_stride(values.shape[0]) - values.shape[0])).contiguous()


def unpack_groups(values: Tensor, n: int) -> Tensor:
    """The values ``(n, G)`` that :func:`pack_groups` was given."""
    return values[:, :n].t().contiguous()
