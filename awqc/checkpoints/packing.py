"""Integer codes as machine words and as dense bits, in plain tensor operations on any device.

Words are little-endian, as safetensors defines them: code ``i`` of a word sits in bits
``i * bits .. (i + 1) * bits - 1``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from awqc.quantized import QuantizedWeight


def reinterpret(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """The same bytes as elements of ``dtype``, the last dimension longer or shorter by the ratio of sizes."""
    # Through one dimension, since the strides of dimensions of size 1 are arbitrary and a view minds them.
    return tensor.contiguous().flatten().view(dtype).view(*tensor.shape[:-1], -1)


def pack_nibbles(codes: Tensor) -> Tensor:
    """4-bit codes ``(..., K)`` uint8, K even, as bytes ``(..., K / 2)``: even elements in the low halves."""
    return codes[..., 0::2] | codes[..., 1::2] << 4


def unpack_nibbles(packed: Tensor) -> Tensor:
    """Inverse of :func:`pack_nibbles`; ``packed`` ``(..., C)`` may be integers of any width.

    Returns:
        ``(..., 2 * bytes)`` uint8.
    """
    packed = reinterpret(packed, torch.uint8)
    return torch.stack([packed & 15, packed >> 4], dim=-1).flatten(-2)


def pack_words(codes: Tensor, bits: int) -> Tensor:
    """Codes ``(..., K)`` uint8 of 4 or 8 bits as words ``(..., K * bits / 32)`` int32, in their order."""
    return reinterpret(pack_nibbles(codes) if bits == 4 else codes, torch.int32)


def unpack_words(words: Tensor, bits: int) -> Tensor:
    """Inverse of :func:`pack_words`: ``(..., W)`` int32 -> ``(..., W * 32 / bits)`` uint8."""
    return unpack_nibbles(words) if bits == 4 else reinterpret(words, torch.uint8)


def pack_bits(codes: Tensor, bits: int) -> Tensor:
    """Codes ``(..., K)`` uint8 of any width, row by row without gaps: every 8 codes fill ``bits`` bytes.

    Returns:
        ``(..., ceil(K / 8) * bits)`` uint8; the last codes of a row are padded with zeros.
    """
    padded = torch.nn.functional.pad(codes, (0, -codes.shape[-1] % 8))
    if bits == 4:  # the same bytes, ten times as fast
        return pack_nibbles(padded)
    padded = padded.unflatten(-1, (-1, 8))
    word = padded[..., 0].to(torch.int64)
    for i in range(1, 8):
        word |= padded[..., i].to(torch.int64) << bits * i
    octets = [(word >> 8 * j).to(torch.uint8) for j in range(bits)]
    return torch.stack(octets, dim=-1).flatten(-2)


def unpack_bits(packed: Tensor, bits: int, count: int) -> Tensor:
    """Inverse of :func:`pack_bits`: the ``count`` codes of every row, ``(N, count)`` uint8."""
    if bits == 4:
        return unpack_nibbles(packed)[..., :count].contiguous()
    octets = packed.unflatten(-1, (-1, bits))
    word = octets[..., 0].to(torch.int64)
    for j in range(1, bits):
        word |= octets[..., j].to(torch.int64) << 8 * j
    codes = [(word >> bits * i & (1 << bits) - 1).to(torch.uint8) for i in range(8)]
    return torch.stack(codes, dim=-1).flatten(-2)[..., :count].contiguous()


def shapes(weight: QuantizedWeight) -> Tensor:
    """``(N, K)`` as a tensor ``(2,)`` int64; of the weights of E linears ``(E, 2)``."""
    *several, n, k = weight.codes.shape
    return torch.tensor([n, k]).repeat(*several, 1)
