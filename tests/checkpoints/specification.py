"""The formats, one code at a time, written from their descriptions: slow, and sharing nothing with awqc.

Codes are ``(N, K)`` lists or arrays of integers; words are returned as signed integers, as they are stored.
"""

from __future__ import annotations

import numpy as np

#: AutoAWQ gemm: nibble i of a word is output channel ORDER[i] of its eight
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def word(codes: list[int], bits: int = 4, width: int = 32) -> int:
    """Codes as one signed word of ``width`` bits, the first in the lowest bits."""
    value = 0
    for i, code in enumerate(codes):
        assert 0 <= code < 1 << bits
        value += int(code) << bits * i
    return value - (1 << width) if value >= 1 << width - 1 else value


def codes_of(stored: int, bits: int = 4, width: int = 32) -> list[int]:
    """Inverse of :func:`word`."""
    return [int(stored) >> bits * i & (1 << bits) - 1 for i in range(width // bits)]


def read_gemm(words: np.ndarray) -> np.ndarray:
    """gemm ``qweight`` or ``qzeros`` ``(C, N / 8)`` -> ``(N, C)``."""
    columns, groups = words.shape
    codes = np.zeros((8 * groups, columns), dtype=np.uint8)
    for c in range(columns):
        for g in range(groups):
            for i, code in enumerate(codes_of(words[c, g])):
                codes[8 * g + ORDER[i], c] = code
    return codes


def read_natural(words: np.ndarray, bits: int = 4) -> np.ndarray:
    """Words ``(N, W)`` in their own order -> ``(N, W * 32 / bits)``."""
    rows = [[code for stored in row for code in codes_of(stored, bits)] for row in words]
    return np.array(rows, dtype=np.uint8)


def write_natural(codes: np.ndarray, bits: int = 4) -> np.ndarray:
    """``(N, K)`` -> int32 words ``(N, K * bits / 32)``; the last word of a row is filled up with zeros."""
    per_word = 32 // bits
    padded = np.pad(codes, ((0, 0), (0, -codes.shape[1] % per_word)))
    rows = [
        [word(list(row[at : at + per_word]), bits) for at in range(0, len(row), per_word)] for row in padded
    ]
    return np.array(rows, dtype=np.int32)


def padded_to(width: int, matrix: np.ndarray) -> np.ndarray:
    """Columns of zeros added up to ``width``."""
    return np.pad(matrix, ((0, 0), (0, width - matrix.shape[1])))


def zero_words(groups: int, group: int) -> int:
    """Words of zero points in a row of the gemv layouts: whole multiples of 1, 2 or 4 by group size."""
    multiple = 4 if group == 32 else 2 if group == 64 else 1
    words = 0
    while words * 8 < groups or words % multiple:
        words += 1
    return words


def write_gemv_fast(codes: np.ndarray) -> np.ndarray:
    """``(N, K)`` -> int16 words ``(N / 4, K)``.

    Of every 32 input channels the first 8, the next 8, ... stand in four columns; pairs are taken across the
    columns, and every 8 so gathered are split into evens and odds. Four rows are then laid side by side, 64
    channels of each, and cut into words of four codes.
    """
    n, k = codes.shape
    order = []
    for pair in range(4):
        gathered = [8 * column + 2 * pair + side for column in range(4) for side in (0, 1)]
        order += gathered[0::2] + gathered[1::2]
    packed = np.zeros((n // 4, k), dtype=np.int16)
    for block in range(n // 4):
        for start in range(0, k, 64):
            line = [
                codes[4 * block + row, start + half + channel]
                for row in range(4)
                for half in (0, 32)
                for channel in order
            ]
            for at in range(64):
                packed[block, start + at] = word(line[4 * at : 4 * at + 4], width=16)
    return packed


def write_marlin(codes: np.ndarray) -> np.ndarray:
    """``(N, K)`` -> int32 words ``(K / 16, 2 N)``, walking over the threads of a warp.

    In ``mma.m16n8k16`` thread ``lane`` holds rows 2i, 2i+1, 2i+8, 2i+9 (i = lane mod 4) of column lane / 4 of
    the 16 x 8 operand B. It takes two such operands, side by side, from one word, and four words at once.
    """
    n, k = codes.shape
    packed = np.zeros((k // 16, 2 * n), dtype=np.int32)
    for tile in range(k // 16):
        at = 0
        for columns in range(0, n, 64):
            for lane in range(32):
                for quarter in range(4):
                    values = [
                        codes[columns + 16 * quarter + 8 * operand + lane // 4, 16 * tile + row]
                        for operand in (0, 1)
                        for row in (lane % 4 * 2, lane % 4 * 2 + 1, lane % 4 * 2 + 8, lane % 4 * 2 + 9)
                    ]
                    packed[tile, at] = word([values[i] for i in ORDER])
                    at += 1
    return packed


def write_marlin_scales(scales: np.ndarray) -> np.ndarray:
    """``(N, G)`` -> ``(G, N)`` in the order in which the threads of a warp need them."""
    n, groups = scales.shape
    if groups > 1:
        order = [block + i + 8 * j for block in range(0, n, 64) for i in range(8) for j in range(8)]
    else:
        pairs = (0, 1, 8, 9, 16, 17, 24, 25)
        order = [block + 2 * i + pair for block in range(0, n, 32) for i in range(4) for pair in pairs]
    return np.stack([[scales[channel, g] for channel in order] for g in range(groups)])


def read_bits(packed: np.ndarray, bits: int, count: int) -> np.ndarray:
    """awqc artifact: each row is one long little-endian number with ``bits`` bits for every code."""
    numbers = [int.from_bytes(row.tobytes(), "little") for row in packed]
    return np.array(
        [[number >> bits * i & (1 << bits) - 1 for i in range(count)] for number in numbers], dtype=np.uint8
    )
