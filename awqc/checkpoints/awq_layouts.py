"""The four ways in which AWQ checkpoints lay a linear out on disk, all with 4-bit codes.

``W`` is ``(N, K)``: N output channels, K input channels, G groups. Every index below is written as its
digits from the slowest to the fastest, so packing and unpacking are a reshape and a permutation.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from awqc.checkpoints.packing import reinterpret, unpack_nibbles
from awqc.errors import CheckpointError

Part = tuple[tuple[int, ...], tuple[torch.dtype, ...]]
Decoded = tuple[Tensor, Tensor, "Tensor | None"]

ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # output channel in nibble i of a word of the gemm layout
FLOATS = (torch.float16, torch.bfloat16, torch.float32)


class AwqLayout(ABC):
    """One layout; its tensors go by the keys ``qweight``, ``scales`` and, where it has them, ``zeros``.

    ``zeros`` lists the names that the tensor of zero points may have on disk.
    """

    zeros: tuple[str, ...] = ("qzeros",)

    @abstractmethod
    def features(self, rows: int, columns: int) -> tuple[int, int]:
        """``(N, K)`` of a linear whose ``qweight`` is ``(rows, columns)``, rounded up to what it can be."""

    @abstractmethod
    def parts(self, n: int, k: int, group: int) -> dict[str, Part]:
        """Shape and accepted dtypes of each tensor of a linear ``(N, K)`` with groups of ``group``."""

    @abstractmethod
    def decode(self, tensors: Mapping[str, Tensor], groups: int) -> Decoded:
        """Codes ``(N, K)`` uint8, scales ``(N, G)`` and zero points ``(N, G)`` uint8, None if absent.

        Raises:
            CheckpointError: if zero points are not integers.
        """


class Gemm(AwqLayout):
    """Transposed; a word holds eight output channels in the order 0, 2, 4, 6, 1, 3, 5, 7: the one with the
    binary digits ``h m p`` is nibble ``4p + 2h + m``."""

    def features(self, rows: int, columns: int) -> tuple[int, int]:
        return 8 * columns, rows

    def parts(self, n: int, k: int, group: int) -> dict[str, Part]:
        groups = math.ceil(k / group)
        return {
            "qweight": ((k, n // 8), (torch.int32,)),
            "scales": ((groups, n), FLOATS),
            "zeros": ((groups, n // 8), (torch.int32,)),
        }

    def decode(self, tensors: Mapping[str, Tensor], groups: int) -> Decoded:
        zeros = unpack_gemm(tensors["zeros"]) if "zeros" in tensors else None
        return unpack_gemm(tensors["qweight"]), tensors["scales"].t().contiguous(), zeros


class Gemv(AwqLayout):
    """Words hold eight input channels in their order; zero points likewise eight groups, both padded."""

    def features(self, rows: int, columns: int) -> tuple[int, int]:
        return rows, 8 * columns

    def parts(self, n: int, k: int, group: int) -> dict[str, Part]:
        width = padded_words(k, group)
        return {
            "qweight": ((n, k // 8), (torch.int32,)),
            "scales": ((n, 8 * width), FLOATS),
            "zeros": ((n, width), (torch.int32,)),
        }

    def decode(self, tensors: Mapping[str, Tensor], groups: int) -> Decoded:
        zeros = unpack_nibbles(tensors["zeros"])[:, :groups].contiguous() if "zeros" in tensors else None
        return unpack_nibbles(tensors["qweight"]), tensors["scales"][:, :groups].contiguous(), zeros


class GemvFast(AwqLayout):
    """16-bit words of four codes; zero points as the float ``-scale * zero``.

    Four rows ``n = 4R + r`` share a row of words. Of their input channels ``k = 64t + 32h + 8a + 2b + c``
    the word in column ``64t + 16r + 8h + 2b + c`` holds the four that differ in ``a``, lowest first.
    """

    zeros = ("qzeros", "scaled_zeros")

    def features(self, rows: int, columns: int) -> tuple[int, int]:
        return 4 * rows, math.ceil(columns / 64) * 64

    def parts(self, n: int, k: int, group: int) -> dict[str, Part]:
        shape = (8 * padded_words(k, group), n)
        return {
            "qweight": ((n // 4, k), (torch.int16,)),
            "scales": (shape, FLOATS),
            "zeros": (shape, FLOATS),
        }

    def decode(self, tensors: Mapping[str, Tensor], groups: int) -> Decoded:
        rows, k = tensors["qweight"].shape
        digits = unpack_nibbles(tensors["qweight"]).view(rows, k // 64, 4, 2, 4, 2, 4)  # R t r h b c a
        codes = digits.permute(0, 2, 1, 3, 6, 4, 5).reshape(4 * rows, k)
        scales = tensors["scales"][:groups].t().contiguous()
        if "zeros" not in tensors:
            return codes, scales, None
        return codes, scales, _whole(-tensors["zeros"][:groups].t().float() / scales.float())


class Marlin(AwqLayout):
    """Symmetric codes in the order in which tensor cores consume them.

    A tile of 16 input channels ``k = 16T + 8e + 2r + f`` and 64 output channels ``n = 64t + 16j + 8b + c``
    is the B operand of ``mma.m16n8k16`` (PTX ISA, matrix fragments): thread ``4c + r`` of a warp owns its
    elements ``(e, f)``. It loads four words (``j``) of eight nibbles, of which ``4f + 2b + e`` is this code.
    """

    zeros = ()

    def features(self, rows: int, columns: int) -> tuple[int, int]:
        return math.ceil(columns / 128) * 64, 16 * rows

    def parts(self, n: int, k: int, group: int) -> dict[str, Part]:
        return {
            "qweight": ((k // 16, 2 * n), (torch.int32,)),
            "scales": ((math.ceil(k / group), n), FLOATS),
        }

    def decode(self, tensors: Mapping[str, Tensor], groups: int) -> Decoded:
        tiles, words = tensors["qweight"].shape
        digits = unpack_nibbles(tensors["qweight"]).view(
            tiles, words // 128, 8, 4, 4, 2, 2, 2
        )  # T t c r j f b e
        n = words // 2
        codes = digits.permute(1, 4, 6, 2, 0, 7, 3, 5).reshape(n, 16 * tiles)
        if groups > 1:  # position 8i + j of 64 channels holds channel 8j + i
            ordered = tensors["scales"].view(groups, n // 64, 8, 8).transpose(-1, -2)
        else:  # position 8i + 2h + l of 32 channels holds channel 8h + 2i + l
            ordered = tensors["scales"].view(groups, n // 32, 4, 4, 2).transpose(-2, -3)
        return codes, ordered.reshape(groups, n).t().contiguous(), None


def _whole(quotient: Tensor) -> Tensor:
    """Zero points ``(N, G)`` uint8 from ``scale * zero / scale``, both factors rounded to 16 bits."""
    quotient = quotient.nan_to_num(nan=0.0)  # a dead group: scale and product are both zero
    zeros = quotient.round()
    if bool(((quotient - zeros).abs() > 0.25).any()) or bool(((zeros < 0) | (zeros > 15)).any()):
        raise CheckpointError(
            "the zero points are not whole numbers from 0 to 15 after division by the scales: awqc reads "
            "integer zero points only"
        )
    return zeros.to(torch.uint8)


def padded_words(k: int, group: int) -> int:
    """Words of eight that hold the zero points of a row in the ``gemv`` layouts."""
    multiple = {64: 2, 32: 4}.get(group, 1)
    return math.ceil(math.ceil(math.ceil(k / group) / 8) / multiple) * multiple


def pack_gemm(codes: Tensor) -> Tensor:
    """Codes ``(..., N, C)`` uint8, N a multiple of 8, as words ``(..., C, N / 8)`` int32 in the order of
    :class:`Gemm`."""
    rows = codes.unflatten(-2, (-1, 8))
    words = rows[..., ORDER[0], :].to(torch.int32)
    for nibble in range(1, 8):
        words |= rows[..., ORDER[nibble], :].to(torch.int32) << 4 * nibble
    # Transposed last, as whole words: moving single codes across the matrix takes four times as long.
    return words.mT.contiguous()


def unpack_gemm(words: Tensor) -> Tensor:
    """Inverse of :func:`pack_gemm`: ``(C, N / 8)`` int32 -> ``(N, C)`` uint8."""
    octets = reinterpret(words.t().contiguous().unsqueeze(-1), torch.uint8)  # channels / 8, column, (p h)
    octets = octets.unflatten(2, (2, 2)).permute(0, 3, 2, 1)  # channels / 8, h, p, column
    return torch.stack([octets & 15, octets >> 4], dim=2).flatten(0, 3)


#: ``version`` in the config -> layout. ExLlama repacks ``gemm`` files when it loads them.
LAYOUTS: Mapping[str, Callable[[], AwqLayout]] = {
    "gemm": Gemm,
    "exllama": Gemm,
    "exllamav2": Gemm,
    "gemv": Gemv,
    "gemv_fast": GemvFast,
    "llm-awq": GemvFast,
    "marlin": Marlin,
}
