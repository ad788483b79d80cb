"""``awqc::qlinear_marlin``: the linear on a quantized weight on NVIDIA tensor cores, Ampere and later.

One packed weight (:mod:`awqc.kernels.marlin_layout`) serves every number of tokens M:

* small M: ``marlin_small.cu`` streams the packed weight once for every 16 tokens, bound by memory;
* on Hopper, larger M: ``marlin_wide.cu`` dequantizes in registers, in front of the tensor cores,
  ``marlin_pair.cu`` likewise where rows are few, and ``marlin_many.cu`` where tokens are many;
* elsewhere: the weight is written out dense (``marlin_dequantize.cu``) and the matrix product is cuBLAS's.

Sums are taken in float32, in an order that the shape alone decides: the same input gives the same bits.
"""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from awqc.kernels import marlin_layout as layout
from awqc.kernels import marlin_many, marlin_pair, marlin_stream, marlin_wide
from awqc.kernels.cuda_launch import kernel
from awqc.kernels.extension import implement_in_python
from awqc.kernels.hardware import Hardware, hardware
from awqc.kernels.launch import Launch, describes, nbytes
from awqc.kernels.machine_code import CudaCode
from awqc.kernels.marlin_stream import has_bulk_copies
from awqc.kernels.qlinear import LIBRARY
from awqc.kernels.registry import register_kernel

#: Most tokens for which the packed weight is streamed: without Hopper's wide kernel, and with it.
STREAMED_TOKENS = (64, 16)
#: Threads of a block of ``marlin_dequantize.cu``.
_THREADS = 128
_SCHEMA = (
    "(Tensor x, Tensor packed, Tensor? bias, int out_features, int group, bool bfloat16_scales) -> Tensor"
)
LIBRARY.define(f"qlinear_marlin{_SCHEMA}", tags=(torch.Tag.pt2_compliant_tag,))


def qlinear_marlin(
    x: Tensor, packed: Tensor, bias: Tensor | None, out_features: int, group: int, bfloat16_scales: bool
) -> Tensor:
    """``x @ W.T + bias`` for ``x`` ``(..., K)`` of any floating dtype and strides; ``(..., N)`` like ``x``.

    Activations that are neither float16 nor bfloat16 are rounded to bfloat16.

    Args:
        packed: ``(ceil(N / 64), ceil(K / 128), 4, bytes)`` uint8, of :func:`awqc.kernels.marlin_layout.pack`.
        bias: ``(N,)`` floating, or None.
        out_features: N.
        group: channels that share a scale within a block: 32, 64 or 128.
        bfloat16_scales: whether packed scales are bfloat16 rather than float16.
    """
    rows, bias = kernel_inputs(x, bias)
    arguments = (rows, packed, bias, out_features, group, bfloat16_scales)
    tokens = rows.shape[0]
    if streams(rows):
        out = marlin_stream.multiply(*arguments)
    elif has_bulk_copies(x.device):
        row_blocks, columns = packed.shape[:2]
        tiling = marlin_pair.plan(row_blocks, columns, tokens, group, x.device)
        if tiling is not None:
            out = marlin_pair.multiply(tiling, *arguments)
        else:
            many = marlin_many.takes(row_blocks, columns, tokens, hardware(x.device).processors)
            out = (marlin_many if many else marlin_wide).multiply(*arguments)
    else:
        weight = dequantize(packed, out_features, x.shape[-1], group, bfloat16_scales, rows.dtype)
        out = F.linear(rows, weight, bias)
    return out.to(x.dtype).view(*x.shape[:-1], out_features)


def streams(rows: Tensor) -> bool:
    """Whether ``rows`` ``(M, K)`` are few enough for the streaming kernel."""
    return rows.shape[0] <= STREAMED_TOKENS[has_bulk_copies(rows.device)]


def kernel_inputs(x: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Rows of tokens, and the bias, in the dtype that kernels multiply."""
    dtype = x.dtype if x.dtype in (torch.float16, torch.bfloat16) else torch.bfloat16
    rows = x.reshape(-1, x.shape[-1]).to(dtype).contiguous()
    return rows, None if bias is None else bias.to(dtype)


@describes(torch.ops.awqc.qlinear_marlin.default)
def describe(
    at: Hardware,
    x: Tensor,
    packed: Tensor,
    bias: Tensor | None,
    out_features: int,
    group: int,
    bfloat16_scales: bool,
) -> list[Launch]:
    """The launches of :func:`qlinear_marlin`."""
    rows, bias = kernel_inputs(x, bias)
    arguments = (rows, packed, bias, out_features, group, bfloat16_scales)
    tokens, (row_blocks, columns) = rows.shape[0], packed.shape[:2]
    if tokens <= STREAMED_TOKENS[at.has_bulk_copies]:
        return marlin_stream.describe(at, *arguments)
    if at.has_bulk_copies:
        tiling = marlin_pair.tile(row_blocks, columns, tokens, group, at.processors, at.shared_bytes)
        if tiling is not None:
            return marlin_pair.describe(tiling, *arguments)
        many = marlin_many.takes(row_blocks, columns, tokens, at.processors)
        return (marlin_many if many else marlin_wide).describe(at, *arguments)
    dense = out_features * rows.shape[1] * rows.itemsize
    written = Launch(
        "marlin_dequantize.cu:dequantize",
        nbytes(packed),
        dense,
        grid=(columns, row_blocks),
        block=(_THREADS,),
        code=CudaCode("marlin_dequantize.cu", "dequantize", _macros(group, bfloat16_scales, rows.dtype)),
    )
    product = Launch("cuBLAS", nbytes(rows, bias) + dense, tokens * out_features * rows.itemsize)
    return [written, product]


def _macros(group: int, bfloat16_scales: bool, dtype: torch.dtype) -> dict[str, int]:
    return {"BF16": int(dtype == torch.bfloat16), "SCALE_BF16": int(bfloat16_scales), "GROUP": group}


def dequantize(
    packed: Tensor, n: int, k: int, group: int, bfloat16_scales: bool, dtype: torch.dtype
) -> Tensor:
    """The packed weight as ``(n, k)`` in ``dtype``, float16 or bfloat16, rounded once."""
    out = torch.empty(n, k, dtype=dtype, device=packed.device)
    defines = _macros(group, bfloat16_scales, dtype)
    run = kernel("marlin_dequantize.cu", "dequantize", "PPiii", packed.device, **defines)
    grid = (packed.shape[1], packed.shape[0])
    run.launch(grid, (_THREADS,), (out.data_ptr(), packed.data_ptr(), n, k, packed.shape[1]))
    return out


implement_in_python("qlinear_marlin", _SCHEMA, qlinear_marlin)


@torch.library.register_fake("awqc::qlinear_marlin", lib=LIBRARY)
def _(
    x: Tensor, packed: Tensor, bias: Tensor | None, out_features: int, group: int, bfloat16_scales: bool
) -> Tensor:
    return x.new_empty((*x.shape[:-1], out_features))


@register_kernel("qlinear")
class Marlin:
    """The tensor-core kernels: their limits, and the packed form both ways."""

    op: ClassVar[torch._ops.OpOverload] = torch.ops.awqc.qlinear_marlin.default

    @staticmethod
    def legal(
        n: int, k: int, bits: int, group_size: int, dtype: torch.dtype, device: torch.device
    ) -> str | None:
        """Why this kernel cannot run a weight ``(n, k)``, in one line; None if it can."""
        if device.type != "cuda" or torch.version.hip is not None:
            return f"runs on NVIDIA GPUs, not on {device}"
        if dtype not in (torch.float16, torch.bfloat16):
            return f"multiplies float16 or bfloat16 activations, not {dtype}"
        if bits > 4:
            return f"holds codes of at most 4 bits, not {bits}"
        if layout.kernel_group(group_size, k) is None:
            return (
                f"needs groups of 32, 64, a multiple of 128, or all input channels, not {group_size} of {k}"
            )
        capability = hardware(device).capability or (0, 0)
        if capability < (8, 0):
            found = ".".join(map(str, capability))
            return f"needs compute capability 8.0 or higher, not {found}"
        return None

    @staticmethod
    def pack(
        codes: Tensor, scales: Tensor, zeros: Tensor, bias: Tensor | None, bits: int, group_size: int
    ) -> tuple[dict[str, Tensor | None], tuple[int, int, bool]]:
        """The op's tensors by argument name, and its constants.

        Args:
            codes: ``(N, K)`` uint8 below ``2 ** bits``.
            scales: ``(N, G)``; rounded to float16 if they are neither that nor bfloat16.
            zeros: ``(N, G)``, at most 16.
            bias: ``(N,)`` or None.
            bits: at most 4.
            group_size: of the codes.
        """
        if scales.dtype not in (torch.float16, torch.bfloat16):
            scales = scales.to(torch.float16)
        group = layout.kernel_group(group_size, codes.shape[1])
        assert group is not None, "pack() is for legal shapes"
        tensors = {"packed": layout.pack(codes, scales, zeros, group_size), "bias": bias}
        return tensors, (codes.shape[0], group, scales.dtype == torch.bfloat16)
