"""``awqc::qlinear_llvm``: the linear on a quantized weight over dot products of bytes, compiled by LLVM.

The code is that of :mod:`awqc.kernels.dot_products`, for the best instruction set that the CPU has. It
reads each code once for a few rows, so that one row takes what reading 4 bits a weight from memory takes.
Its cost grows with the rows, while a bfloat16 matmul is paced by memory at first: beyond
``dot_rows()`` of them the matmul on a dequantized copy is used, if there is one.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from awqc.kernels import llvm
from awqc.kernels.dot_products import ARGUMENTS, TYPES, source
from awqc.kernels.hardware import Hardware
from awqc.kernels.launch import Launch, describes, nbytes
from awqc.kernels.qlinear import LIBRARY, dequantize, group_channels
from awqc.kernels.registry import register_kernel

#: Most rows for which the dot products are used where there is a choice, by instruction set. With VNNI of 512
#: bits and 4096x4096 on one core, 16 rows take 0.96-1.03 of the matmul's time where that has AMX.
DOT_ROWS = {"avx512vnni": 16, "avxvnni": 8, "avx2": 8}
#: Output rows that a vector holds.
_BLOCK = 16
#: Chunks of input channels whose activations share a step, largest first.
_CHUNKS = (256, 128, 64, 32, 16)
_DTYPES = {getattr(torch, name) for name in TYPES}
#: Products of one weight and one activation for which it pays to start another thread.
_SHARE = 1 << 17

LIBRARY.define(
    "qlinear_llvm(Tensor x, Tensor packed, Tensor scales, Tensor zeros, Tensor? dense, Tensor? bias, "
    "int out_features, int chunk) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def qlinear_llvm(
    x: Tensor,
    packed: Tensor,
    scales: Tensor,
    zeros: Tensor,
    dense: Tensor | None,
    bias: Tensor | None,
    out_features: int,
    chunk: int,
) -> Tensor:
    """``x @ W.T + bias`` for ``x`` ``(..., K)`` of any floating dtype and strides; ``(..., N)`` like ``x``.

    Sums are float32, and the result is rounded to the dtype of ``x`` once, after the bias. Of activations
    that are wider than float32 the kernel sees float32.

    Args:
        packed: ``(B, K / 8, 16, 4)`` uint8, two codes to a byte, for ``B = N / 16`` blocks of rows; ``K`` and
            ``N`` are rounded up to whole chunks and blocks.
        scales: ``(B, C, 16)`` float32, float16 or bfloat16, one for each of the ``C`` chunks of a row.
        zeros: ``(B, C, 16)`` uint8.
        dense: ``(N, K)`` bfloat16, the weight for more than ``dot_rows()`` rows, or None.
        bias: ``(N,)`` floating, or None.
        out_features: ``N``.
        chunk: input channels that share a scale here, a divisor of the group size.
    """
    shape = x.shape
    k = shape[-1]
    rows = x.numel() // k
    if dense is not None and rows > dot_rows():
        return _dense(x, dense, bias)
    if x.dtype not in _DTYPES:
        return qlinear_llvm(x.float(), packed, scales, zeros, None, bias, out_features, chunk).to(x.dtype)
    # What follows runs between readings of weights that leave nothing of it in the caches, so it is short.
    blocks, chunks = scales.shape[0], scales.shape[1]
    channels = packed.shape[1] * 8
    out = x.new_empty(*shape[:-1], out_features)
    if not rows:
        return out
    if k != channels:
        x = F.pad(x, (0, channels - k))
    x = x.contiguous()
    if bias is not None:
        bias = (bias if bias.dtype == x.dtype else bias.float()).contiguous()
    # The digits of the activations, then for each row and chunk their sum and their step.
    scratch = torch.empty(rows * (2 * channels + 8 * chunks), dtype=torch.uint8)
    digits = scratch.data_ptr()
    sums = digits + rows * 2 * channels
    linear, call = _function(x.dtype, scales.dtype, None if bias is None else bias.dtype)
    linear(
        _Arguments(
            x.data_ptr(),
            packed.data_ptr(),
            scales.data_ptr(),
            zeros.data_ptr(),
            out.data_ptr(),
            0 if bias is None else bias.data_ptr(),
            digits,
            sums,
            sums + 4 * rows * chunks,
            rows,
            out_features,
            blocks,
            chunks,
            chunk // 8,
            min(torch.get_num_threads(), blocks, 1 + rows * channels * blocks * _BLOCK // _SHARE),
            *call,
        )
    )
    return out


def _dense(x: Tensor, dense: Tensor, bias: Tensor | None) -> Tensor:
    out = F.linear(x.to(torch.bfloat16), dense).to(x.dtype)
    return out if bias is None else out.add_(bias)


_Arguments = ctypes.c_int64 * len(ARGUMENTS)


@functools.cache
def _function(
    x: torch.dtype, scales: torch.dtype, bias: torch.dtype | None
) -> tuple[Callable[[Any], None], tuple[int, int, int]]:
    """The compiled code for these dtypes, and the addresses of what starts its threads.

    Raises:
        RuntimeError: where nothing can be compiled, with the reason.
    """
    isa, threads = llvm.host_isa(), llvm.openmp()
    if isa is None or threads is None:
        raise RuntimeError(f"awqc::qlinear_llvm {llvm.missing()}")
    text = source(isa.name, _name(x), _name(scales), _name(bias or torch.float32))
    function = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(llvm.load(text, "linear", isa))
    return function, (threads.parallel, threads.thread, threads.threads)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


LIBRARY.impl("qlinear_llvm", qlinear_llvm, "CPU")


@describes(torch.ops.awqc.qlinear_llvm.default)
def describe(
    at: Hardware,
    x: Tensor,
    packed: Tensor,
    scales: Tensor,
    zeros: Tensor,
    dense: Tensor | None,
    bias: Tensor | None,
    out_features: int,
    chunk: int,
) -> list[Launch]:
    """The routine that :func:`qlinear_llvm` calls."""
    rows = x.numel() // x.shape[-1]
    out = rows * out_features * x.itemsize
    if dense is not None and rows > dot_rows():
        return [Launch("aten.linear (bfloat16 copy)", nbytes(x, dense, bias), out)]
    isa = llvm.host_isa()
    config: dict[str, int | str] = {"instructions": isa.name} if isa else {}
    return [Launch("dot_products.py:linear", nbytes(x, packed, scales, zeros, bias), out, config=config)]


@torch.library.register_fake("awqc::qlinear_llvm", lib=LIBRARY)
def _(
    x: Tensor,
    packed: Tensor,
    scales: Tensor,
    zeros: Tensor,
    dense: Tensor | None,
    bias: Tensor | None,
    out_features: int,
    chunk: int,
) -> Tensor:
    return x.new_empty((*x.shape[:-1], out_features))


@register_kernel("qlinear")
class LlvmInt4:
    """Dot products of bytes: their limits, their packed form and the way back."""

    op: ClassVar[torch._ops.OpOverload] = torch.ops.awqc.qlinear_llvm.default

    @staticmethod
    def legal(
        n: int, k: int, bits: int, group_size: int, dtype: torch.dtype, device: torch.device
    ) -> str | None:
        """Why this kernel cannot run a weight ``(n, k)``, in one line; None if it can."""
        if device.type != "cpu":
            return f"runs on cpu, not on {device}"
        if _name(dtype) not in TYPES:
            return f"takes float32, float16 or bfloat16 activations, not {dtype}"
        if bits > 4:
            return f"holds codes of at most 4 bits, not {bits}"
        if _chunk(group_size, k) is None:
            return f"needs groups of a multiple of 16 input channels, not group_size={group_size} over {k}"
        return llvm.missing()

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
    ) -> tuple[dict[str, Tensor | None], tuple[int, int]]:
        """The op's tensors by argument name, ``N``, and the chunk.

        Args:
            codes: ``(N, K)`` uint8 below ``2 ** bits``.
            scales: ``(N, G)`` float32, float16 or bfloat16; others become float32.
            zeros: ``(N, G)`` of whole numbers below 256.
            bias: ``(N,)`` or None.
            bits: 2, 3 or 4.
            group_size: of the codes; a multiple of 16, or at least K, or -1.
            dense: keep the bfloat16 weight too, at 2 bytes a weight.
        """
        n, k = codes.shape
        chunk = _chunk(group_size, k)
        assert chunk is not None, "pack() is for legal shapes"
        chunks = -(-k // chunk)
        # Channels 0-3 of eight in the low halves of four bytes, channels 4-7 in the high ones.
        padded = F.pad(codes, (0, chunks * chunk - k, 0, -n % _BLOCK))
        halves = padded.unflatten(0, (-1, _BLOCK)).unflatten(2, (-1, 2, 4))
        packed = (halves[..., 0, :] | halves[..., 1, :] << 4).transpose(1, 2).contiguous()
        held = scales if _name(scales.dtype) in TYPES else scales.float()
        tensors = {
            "packed": packed,
            "scales": _by_block(held, chunk, group_size, k),
            "zeros": _by_block(zeros.to(torch.uint8), chunk, group_size, k),
            "dense": dequantize(codes, scales, zeros, group_size).bfloat16() if dense else None,
            "bias": bias,
        }
        return tensors, (n, chunk)

    @staticmethod
    def unpack(
        packed: Tensor, scales: Tensor, zeros: Tensor, n: int, k: int, group_size: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The codes ``(N, K)``, scales and zeros ``(N, G)`` of :meth:`pack`."""
        chunk = _chunk(group_size, k)
        assert chunk is not None, "unpack() is for what pack() made"
        halves = packed.transpose(1, 2)
        codes = torch.stack([halves & 15, halves >> 4], 3).flatten(2).flatten(0, 1)[:n, :k].contiguous()
        repeats = _repeats(chunk, group_size, k)
        scales, zeros = (
            parts.transpose(1, 2).flatten(0, 1)[:n, ::repeats].contiguous() for parts in (scales, zeros)
        )
        return codes, scales, zeros


@functools.cache
def dot_rows() -> int:
    """Most rows for which the dot products are used on this CPU where there is a choice."""
    isa = llvm.host_isa()
    return DOT_ROWS[isa.name] if isa else 0


def _chunk(group_size: int, in_features: int) -> int | None:
    """The largest chunk into which groups split; the end of the last one may lie beyond the row."""
    channels = group_channels(group_size, in_features)
    if channels == in_features:
        # One group may end anywhere in its last chunk. The end of a chunk costs as much as 24 channels.
        return min(_CHUNKS, key=lambda chunk: -(-in_features // chunk) * (chunk + 24))
    return next((chunk for chunk in _CHUNKS if channels % chunk == 0), None)


def _repeats(chunk: int, group_size: int, in_features: int) -> int:
    """Chunks in a group."""
    return -(-group_channels(group_size, in_features) // chunk)


def _by_block(per_group: Tensor, chunk: int, group_size: int, in_features: int) -> Tensor:
    """``(N, G)`` as ``(B, C, 16)``: one for each chunk of a row, rows side by side."""
    repeats = _repeats(chunk, group_size, in_features)
    spread = per_group.repeat_interleave(repeats, 1)[:, : -(-in_features // chunk)]
    padded = F.pad(spread, (0, 0, 0, -spread.shape[0] % _BLOCK))
    return padded.unflatten(0, (-1, _BLOCK)).transpose(1, 2).contiguous()
