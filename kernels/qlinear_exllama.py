"""``awqc::qlinear_exllama``: the linear on a quantized weight without matrix instructions, in portable CUDA.

The choice for GPUs whose matrix units the other backends do not know. ``exllama.cu`` keeps to what CUDA and
HIP share: loads, shared memory, integer dot products, float32 sums. This module launches it on NVIDIA GPUs.

* M up to the last entry of the configurations: the packed weight is streamed once for every 8 tokens. The
  channels are shared out over blocks until the device is full; a second, ordered pass adds the shares.
  Activations are integers of 14 bits then: of 32 channels of a token, none is off by more than the largest of
  them times 2^-13. That is an error of 1e-4 of a result's norm for normal ones, 4e-4 at worst;
* larger M: the weight is written out dense and the product is the BLAS's.

Sums of 32 channels are exact, further ones float32 in an order that shape and configuration decide: the
same input gives the same bits.
"""

from __future__ import annotations

import functools
import math
from dataclasses import asdict, dataclass
from typing import ClassVar

import torch
from torch import Tensor

from awqc.kernels import configs
from awqc.kernels.cuda_launch import CudaKernel, kernel
from awqc.kernels.exllama_block import ALONE, Block, macros
from awqc.kernels.exllama_layout import (
    CHANNELS,
    pack_groups,
    pack_words,
    unpack_groups,
    unpack_words,
)
from awqc.kernels.hardware import Hardware, hardware
from awqc.kernels.launch import Launch, describes, nbytes
from awqc.kernels.machine_code import CudaCode
from awqc.kernels.nvrtc import available
from awqc.kernels.qlinear import LIBRARY, group_channels, qlinear
from awqc.kernels.registry import register_kernel

#: The name under which configurations are kept.
NAME = "qlinear_exllama"
_SOURCE = "exllama.cu"

LIBRARY.define(
    "qlinear_exllama(Tensor x, Tensor words, Tensor scales, Tensor zeros, Tensor? bias, int out_features, "
    "int group_size) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


@dataclass(frozen=True)
class Prepared:
    """Compiled kernels for one shape, and the shares of its channels.

    Args:
        product: terms of the product over a share of the channels.
        join: sums over the shares.
    """

    product: CudaKernel
    join: CudaKernel
    shares: int


@functools.cache
def prepare(
    block: Block,
    tokens: int,
    rows: int,
    chunks: int,
    dtype: torch.dtype,
    scales: torch.dtype,
    device: torch.device,
) -> Prepared:
    """Kernels for ``tokens`` (a multiple of the block's) on a weight of ``rows`` by ``chunks``."""
    at = hardware(device)
    shares = block.shares(tokens, rows, chunks, at.processors, at.shared_bytes)
    dependent = _dependent(at)
    defines = macros(block, dtype, scales, dependent)
    shared = block.shared_bytes(chunks, shares)
    product = kernel(
        _SOURCE, "product", "PPPPPPPiiiiii", device, shared=shared, dependent=dependent, **defines
    )
    return Prepared(
        product, kernel(_SOURCE, "join", "PPPiii", device, dependent=dependent, **defines), shares
    )


def _dependent(at: Hardware) -> bool:
    """Whether kernels may start while their predecessor finishes."""
    return at.capability is not None and at.capability >= (9, 0)


def _grid(block: Block, m: int, n: int, shares: int) -> tuple[int, int, int]:
    """Of ``product``, for ``m`` tokens and ``n`` rows."""
    return math.ceil(n / (32 * block.columns)), shares, math.ceil(m / block.tokens)


def multiply(
    x: Tensor,
    words: Tensor,
    scales: Tensor,
    zeros: Tensor,
    bias: Tensor | None,
    n: int,
    group: int,
    block: Block,
) -> Tensor:
    """``x @ W.T + bias`` for ``x`` ``(M, K)`` contiguous float16 or bfloat16, streaming the words.

    Args:
        bias: ``(n,)`` like ``x``, or None.
        group: channels that share a scale, a multiple of ``CHANNELS`` or all of them.
    """
    m, k = x.shape
    chunks = words.shape[0] * 8 // CHANNELS
    rounded = block.tokens * math.ceil(m / block.tokens)
    launch = prepare(block, rounded, n, chunks, x.dtype, scales.dtype, x.device)
    y = x.new_empty(m, n)
    partial = y if launch.shares == 1 else x.new_empty(launch.shares, m, n, dtype=torch.float32)
    added = 0 if bias is None else bias.data_ptr()
    launch.product.launch(
        _grid(block, m, n, launch.shares),
        (32 * block.warps,),
        (
            y.data_ptr(),
            partial.data_ptr(),
            x.data_ptr(),
            words.data_ptr(),
            scales.data_ptr(),
            zeros.data_ptr(),
            added,
            m,
            n,
            k,
            words.shape[1],
            chunks,
            math.ceil(group / CHANNELS),
        ),
    )
    if launch.shares > 1:
        launch.join.launch(
            (math.ceil(m * n / 256),),
            (256,),
            (y.data_ptr(), partial.data_ptr(), added, m * n, n, launch.shares),
        )
    return y


def _reconstruct_grid(n: int, k: int) -> tuple[int, int]:
    return math.ceil(n / 512), math.ceil(k / 8)


def dense(
    words: Tensor, scales: Tensor, zeros: Tensor, n: int, k: int, group: int, dtype: torch.dtype
) -> Tensor:
    """The weight transposed, ``(K, N)`` in ``dtype``."""
    defines = macros(ALONE, dtype, scales.dtype)
    weight = words.new_empty(k, n, dtype=dtype)
    kernel(_SOURCE, "reconstruct", "PPPPiiii", words.device, **defines).launch(
        _reconstruct_grid(n, k),
        (256,),
        (
            weight.data_ptr(),
            words.data_ptr(),
            scales.data_ptr(),
            zeros.data_ptr(),
            n,
            k,
            words.shape[1],
            math.ceil(group / 8),
        ),
    )
    return weight


def qlinear_exllama(
    x: Tensor,
    words: Tensor,
    scales: Tensor,
    zeros: Tensor,
    bias: Tensor | None,
    out_features: int,
    group_size: int,
) -> Tensor:
    """``x @ W.T + bias`` for ``x`` ``(..., K)`` of any floating dtype and strides; ``(..., N)`` like ``x``.

    Only float16 and bfloat16 are fast; others are multiplied as the reference does.

    Args:
        words: ``(channels / 8, stride)`` int32, see :mod:`awqc.kernels.exllama_layout`.
        scales: ``(G, stride)`` float16, bfloat16 or float32.
        zeros: ``(G, stride)`` uint8.
        bias: ``(N,)`` floating, or None.
        out_features: ``N``.
        group_size: channels that share a scale; -1 for the whole row.
    """
    k = x.shape[-1]
    if x.dtype not in (torch.float16, torch.bfloat16):
        codes, own_scales, own_zeros = ExLlama.unpack(words, scales, zeros, out_features, k)
        return qlinear(x, codes, own_scales, own_zeros, bias, group_size)
    tokens = x.reshape(-1, k).contiguous()
    group = group_channels(group_size, k)
    addend = None if bias is None else bias.to(x.dtype)
    found = configs.entry(configs.measured(NAME, x.device), tokens.shape[0])
    if tokens.shape[0] == 0:
        y = tokens.new_empty(0, out_features)
    elif found is not None:
        y = multiply(tokens, words, scales, zeros, addend, out_features, group, Block(**found))
    else:
        weight = dense(words, scales, zeros, out_features, k, group, x.dtype)
        y = tokens @ weight if addend is None else torch.addmm(addend, tokens, weight)
    return y.view(*x.shape[:-1], out_features)


LIBRARY.impl("qlinear_exllama", qlinear_exllama, "CUDA")


@describes(torch.ops.awqc.qlinear_exllama.default)
def describe(
    at: Hardware,
    x: Tensor,
    words: Tensor,
    scales: Tensor,
    zeros: Tensor,
    bias: Tensor | None,
    out_features: int,
    group_size: int,
) -> list[Launch]:
    """The launches of :func:`qlinear_exllama` for float16 and bfloat16."""
    m, k = x.numel() // x.shape[-1], x.shape[-1]
    weight, out = nbytes(words, scales, zeros), m * out_features * x.itemsize
    found = configs.entry(configs.measured(NAME, at.name), m)
    if found is None:
        size = k * out_features * x.itemsize
        code = _code("reconstruct", macros(ALONE, x.dtype, scales.dtype))
        whole = _reconstruct_grid(out_features, k)
        return [
            Launch("exllama.cu:reconstruct", weight, size, whole, (256,), code=code),
            Launch("cuBLAS", nbytes(x, bias) + size, out),
        ]
    block, chunks = Block(**found), words.shape[0] * 8 // CHANNELS
    rounded = block.tokens * math.ceil(m / block.tokens)
    shares = block.shares(rounded, out_features, chunks, at.processors, at.shared_bytes)
    defines = macros(block, x.dtype, scales.dtype, _dependent(at))
    partial = shares * m * out_features * 4
    product = Launch(
        "exllama.cu:product",
        weight + nbytes(x, None if shares > 1 else bias),
        partial if shares > 1 else out,
        grid=_grid(block, m, out_features, shares),
        block=(32 * block.warps,),
        shared=block.shared_bytes(chunks, shares),
        config={**asdict(block), "shares": shares},
        code=_code("product", defines),
    )
    if shares == 1:
        return [product]
    code, added = _code("join", defines), nbytes(bias)
    grid = (math.ceil(m * out_features / 256),)
    return [product, Launch("exllama.cu:join", partial + added, out, grid, (256,), code=code)]


def _code(entry: str, defines: dict[str, int]) -> CudaCode:
    return CudaCode(_SOURCE, entry, defines)


@torch.library.register_fake("awqc::qlinear_exllama", lib=LIBRARY)
def _(
    x: Tensor,
    words: Tensor,
    scales: Tensor,
    zeros: Tensor,
    bias: Tensor | None,
    out_features: int,
    group_size: int,
) -> Tensor:
    return x.new_empty((*x.shape[:-1], out_features))


@register_kernel("qlinear")
class ExLlama:
    """The limits of ``awqc::qlinear_exllama``, its packed form and the way back."""

    op: ClassVar[torch._ops.OpOverload] = torch.ops.awqc.qlinear_exllama.default

    @staticmethod
    def legal(
        n: int, k: int, bits: int, group_size: int, dtype: torch.dtype, device: torch.device
    ) -> str | None:
        """Why this kernel cannot run a weight ``(n, k)``, in one line; None if it can."""
        if device.type != "cuda":
            return f"runs on cuda, not on {device}"
        if torch.version.hip is not None:
            return "is compiled by NVRTC, for NVIDIA GPUs; exllama.cu has not been run on others"
        if not available():
            return "needs NVRTC, which torch's CUDA builds bring along: pip install nvidia-cuda-nvrtc"
        if dtype not in (torch.float16, torch.bfloat16):
            return f"multiplies float16 or bfloat16 activations, not {dtype}"
        if bits > 4:
            return f"holds codes of at most 4 bits, not {bits}"
        group = group_channels(group_size, k)
        if group % CHANNELS and group != k:
            return (
                f"needs groups of a multiple of {CHANNELS} input channels, not "
                f"group_size={group_size} over {k}"
            )
        return None

    @staticmethod
    def pack(
        codes: Tensor, scales: Tensor, zeros: Tensor, bias: Tensor | None, bits: int, group_size: int
    ) -> tuple[dict[str, Tensor | None], tuple[int, int]]:
        """The op's tensors by argument name, and the numbers that follow them.

        Args:
            codes: ``(N, K)`` uint8 below 16.
            scales, zeros: ``(N, G)``; scales keep their dtype, zeros are below 16.
            bias: ``(N,)`` or None.
            bits: 2, 3 or 4.
            group_size: of a multiple of 32 channels, or the whole row.
        """
        tensors = {
            "words": pack_words(codes),
            "scales": pack_groups(scales),
            "zeros": pack_groups(zeros.to(torch.uint8)),
            "bias": bias,
        }
        return tensors, (codes.shape[0], group_size)

    @staticmethod
    def unpack(words: Tensor, scales: Tensor, zeros: Tensor, n: int, k: int) -> tuple[Tensor, Tensor, Tensor]:
        """Codes ``(n, k)``, scales and zeros ``(n, G)`` that :meth:`pack` was given."""
        return unpack_words(words, n, k), unpack_groups(scales, n), unpack_groups(zeros, n)
