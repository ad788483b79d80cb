"""``awqc::qlinear_cpu``: the linear on a quantized weight over ATen's 4-bit kernel for CPUs.

Only the bfloat16 form of that kernel is vectorised, so activations of other dtypes are rounded to
bfloat16 on the way in, as are scales. Codes of 2 and 3 bits run as 4-bit ones. Its cost grows with every
row of ``x``, while a bfloat16 matmul is paced by memory at first: from ``INT4_ROWS + 1`` rows on, the
matmul on a dequantized copy is the faster of the two, if there is one.
"""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from awqc.kernels.hardware import Hardware
from awqc.kernels.launch import Launch, describes, nbytes
from awqc.kernels.qlinear import LIBRARY, dequantize, group_channels
from awqc.kernels.registry import register_kernel

#: Most rows for which the 4-bit kernel is used where there is a choice. It works on tiles of 4 rows. For
#: 4096x4096 and 11008x4096, 8 rows take 0.79-0.92 of the matmul's time and 9 rows 1.05-1.15 (one and two
#: AVX512 cores); below 2048x2048 the matmul draws level at 5 to 8 rows, at 0.1 ms and less.
INT4_ROWS = 8
#: Group sizes that the 4-bit kernel knows, largest first.
GROUPS = (256, 128, 64, 32)
#: Rows after which the order of the packed codes repeats, on every instruction set.
_BLOCK = 64
_INT4_MATMUL = torch.ops.aten._weight_int4pack_mm_for_cpu.default
_INT4_PACK = torch.ops.aten._convert_weight_to_int4pack_for_cpu.default

LIBRARY.define(
    "qlinear_cpu(Tensor x, Tensor packed, Tensor scales_and_zeros, Tensor? dense, Tensor? bias, "
    "int group_size) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def qlinear_cpu(
    x: Tensor,
    packed: Tensor,
    scales_and_zeros: Tensor,
    dense: Tensor | None,
    bias: Tensor | None,
    group_size: int,
) -> Tensor:
    """``x @ W.T + bias`` for ``x`` ``(..., K)`` of any floating dtype and strides; ``(..., N)`` like ``x``.

    Args:
        packed: ``(N, K / 2)`` uint8, two codes to a byte in an order of the CPU's own.
        scales_and_zeros: ``(K / group_size, N, 2)`` bfloat16: ``s`` and ``(8 - z) * s``.
        dense: ``(N, K)`` bfloat16, the weight for more than ``INT4_ROWS`` rows, or None.
        bias: ``(N,)`` floating, or None.
        group_size: one of ``GROUPS``.
    """
    rows = x.reshape(-1, x.shape[-1]).to(torch.bfloat16).contiguous()
    if dense is not None and rows.shape[0] > INT4_ROWS:
        out = F.linear(rows, dense)
    else:
        out = _INT4_MATMUL(rows, packed, group_size, scales_and_zeros)
    out = out.to(x.dtype)
    if bias is not None:
        out.add_(bias)
    return out.view(*x.shape[:-1], out.shape[-1])


LIBRARY.impl("qlinear_cpu", qlinear_cpu, "CPU")


@describes(torch.ops.awqc.qlinear_cpu.default)
def describe(
    at: Hardware,
    x: Tensor,
    packed: Tensor,
    scales_and_zeros: Tensor,
    dense: Tensor | None,
    bias: Tensor | None,
    group_size: int,
) -> list[Launch]:
    """The routine that :func:`qlinear_cpu` calls."""
    rows = x.numel() // x.shape[-1]
    out = rows * packed.shape[0] * x.itemsize
    if dense is not None and rows > INT4_ROWS:
        return [Launch("aten.linear (bfloat16 copy)", nbytes(x, dense, bias), out)]
    return [Launch("aten._weight_int4pack_mm_for_cpu", nbytes(x, packed, scales_and_zeros, bias), out)]


@torch.library.register_fake("awqc::qlinear_cpu", lib=LIBRARY)
def _(
    x: Tensor,
    packed: Tensor,
    scales_and_zeros: Tensor,
    dense: Tensor | None,
    bias: Tensor | None,
    group_size: int,
) -> Tensor:
    return x.new_empty((*x.shape[:-1], packed.shape[0]))


@register_kernel("qlinear")
class AtenInt4:
    """ATen's 4-bit kernel: its limits, its packed form and the way back."""

    op: ClassVar[torch._ops.OpOverload] = torch.ops.awqc.qlinear_cpu.default

    @staticmethod
    def legal(
        n: int, k: int, bits: int, group_size: int, dtype: torch.dtype, device: torch.device
    ) -> str | None:
        """Why this kernel cannot run a weight ``(n, k)``, in one line; None if it can."""
        if device.type != "cpu":
            return f"runs on cpu, not on {device}"
        if dtype not in (torch.float32, torch.float16, torch.bfloat16):
            return f"computes in bfloat16: float32, float16 or bfloat16 activations, not {dtype}"
        if bits > 4:
            return f"holds codes of at most 4 bits, not {bits}"
        if n % 16:
            return f"needs a multiple of 16 output features, not {n}"
        if _kernel_group(group_size, k) is None:
            return (
                "needs groups that split into 32, 64, 128 or 256 input channels, not "
                f"group_size={group_size} over {k}"
            )
        return None

    @staticmethod
    def pack(
        codes: Tensor,
        scales: Tensor,
        zeros: Tensor,
        bias: Tensor | None,
        bits: int,
        group_size: int,
        *,
        dense: bool = True,
    ) -> tuple[dict[str, Tensor | None], tuple[int]]:
        """The op's tensors by argument name, and its group size.

        Args:
            codes: ``(N, K)`` uint8 below ``2 ** bits``.
            scales, zeros: ``(N, G)``.
            bias: ``(N,)`` or None.
            bits: 2, 3 or 4.
            group_size: of the codes; a multiple of the kernel's own, or -1.
            dense: keep the bfloat16 weight too, at 2 bytes a weight.
        """
        k = codes.shape[1]
        group = _kernel_group(group_size, k)
        assert group is not None, "pack() is for legal shapes"
        offset = _offset(bits)
        scales_and_zeros = torch.stack([scales.float(), (8 - offset - zeros.float()) * scales.float()], -1)
        # A group of several kernel groups hands its scale to each; a ragged last one to fewer.
        repeats = group_channels(group_size, k) // group
        scales_and_zeros = scales_and_zeros.repeat_interleave(repeats, 1)[:, : k // group]
        tensors = {
            "packed": _pack(codes + offset),
            "scales_and_zeros": scales_and_zeros.transpose(0, 1).bfloat16().contiguous(),
            "dense": dequantize(codes, scales, zeros, group_size).bfloat16() if dense else None,
            "bias": bias,
        }
        return tensors, (group,)

    @staticmethod
    def unpack(packed: Tensor, bits: int) -> Tensor:
        """The codes ``(N, K)`` uint8 of ``bits`` bits that :meth:`pack` was given.

        The order of the packed codes depends on the CPU's vector width, so it is asked for rather than
        assumed: packing the hexadecimal digits of each code's own position shows where the packer puts it.

        Raises:
            RuntimeError: if packing the codes does not give ``packed`` back, bit for bit.
        """
        n, k = packed.shape[0], packed.shape[1] * 2
        whole = n // _BLOCK * _BLOCK
        blocks = [packed[:whole].view(-1, _BLOCK, k // 2), packed[whole:].unsqueeze(0)]
        codes = torch.cat([_codes_of_blocks(block) for block in blocks if block.numel()])
        if not torch.equal(_pack(codes), packed):
            raise RuntimeError(
                f"the 4-bit packing of torch {torch.__version__} on this CPU does not repeat every "
                f"{_BLOCK} rows: the codes of a {n}x{k} weight cannot be read back"
            )
        return codes - _offset(bits)


def _kernel_group(group_size: int, in_features: int) -> int | None:
    """The largest kernel group into which the groups of a row split, a ragged last one included."""
    channels = group_channels(group_size, in_features)
    return next((g for g in GROUPS if channels % g == 0 and in_features % g == 0), None)


def _offset(bits: int) -> int:
    """What to add to codes and zero points so that codes lie around 8, where the kernel's own zero is.

    The weight stays the same and ``(8 - z) * s``, which gets rounded, becomes small: for 3 bits that
    brings the error from 2.5 times that of a bfloat16 matmul down to the same.
    """
    return 8 - (1 << (bits - 1))


def _pack(codes: Tensor) -> Tensor:
    return _INT4_PACK(codes.int(), 1)


def _nibbles(packed: Tensor) -> Tensor:
    return torch.stack([packed & 15, packed >> 4], -1).flatten(-2)


def _codes_of_blocks(blocks: Tensor) -> Tensor:
    """Codes ``(B * R, K)`` of ``blocks`` ``(B, R, K / 2)``, all packed in the same order."""
    rows, k = blocks.shape[1], blocks.shape[2] * 2
    position = torch.arange(rows * k).view(rows, k)
    source = torch.zeros(rows * k, dtype=torch.int64)
    for shift in range(0, (rows * k - 1).bit_length(), 4):
        source += _nibbles(_pack(position >> shift & 15)).flatten().long() << shift
    return _nibbles(blocks).flatten(1)[:, source.argsort()].view(-1, k)
