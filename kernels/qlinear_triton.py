"""``awqc::qlinear_triton``: the linear on a quantized weight in Triton, for NVIDIA and AMD GPUs.

One packed weight (:mod:`awqc.kernels.planes`) serves every number of tokens M:

* small M: ``jit/gemm_triton.py`` streams the packed weight. One wave of programs fills the device; where the
  rows alone do not, K is shared out and the shares are added in a second, ordered pass;
* larger M on Hopper: ``jit/many_gluon.py``, which feeds its matrix unit from registers;
* larger M elsewhere, and many tokens: the weight is written out dense (``jit/dequantize_triton.py``) and the
  product is the BLAS's.

Sums are float32, in an order that the shape and the launch configuration decide: the same input gives the
same bits. Triton itself is imported at the first launch.
"""

from __future__ import annotations

import functools
import importlib.util
import math
from collections.abc import Mapping
from dataclasses import asdict
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from awqc.kernels import configs, triton_many
from awqc.kernels.aligned import aligned
from awqc.kernels.autotune import fastest, may_tune
from awqc.kernels.hardware import Hardware, hardware
from awqc.kernels.launch import Launch, describes, nbytes
from awqc.kernels.planes import pack_groups, pack_planes, plane_width, unpack_groups, unpack_planes
from awqc.kernels.qlinear import LIBRARY
from awqc.kernels.registry import register_kernel
from awqc.kernels.triton_call import Call, Target, interpreted, target
from awqc.kernels.triton_many import Cut
from awqc.kernels.triton_tile import Tile
from awqc.kernels.triton_weight import Weight

#: The name under which configurations are kept.
NAME = "qlinear_triton"
#: Numbers of tokens between which the autotuner lets the configuration change.
TOKENS = (8, 16, 32, 64, 128, 256)

LIBRARY.define(
    "qlinear_triton(Tensor x, Tensor packed, Tensor scales, Tensor zeros, Tensor? bias, int out_features, "
    "int group_size) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def multiply(x: Tensor, weight: Weight, bias: Tensor | None, how: Tile | Cut) -> Tensor:
    """``x @ W.T + bias`` for ``x`` ``(M, K)`` contiguous float16 or bfloat16: ``(M, N)``."""
    y = x.new_empty(x.shape[0], weight.n)
    for call in calls(x, weight, bias, y, how, target(x.device)):
        call.launch()
    return y


def calls(
    x: Tensor, weight: Weight, bias: Tensor | None, y: Tensor, how: Tile | Cut, at: Target
) -> list[Call]:
    """The calls that write ``x @ W.T + bias`` to ``y`` ``(M, N)``."""
    if isinstance(how, Cut):
        return triton_many.product(aligned(x), weight, bias, y, how)
    return product(x, weight, bias, y, how, at)


def product(x: Tensor, weight: Weight, bias: Tensor | None, y: Tensor, tile: Tile, at: Target) -> list[Call]:
    """The calls that write ``x @ W.T + bias`` to ``y`` ``(M, N)``."""
    from awqc.kernels.jit.gemm_triton import gemm

    m = x.shape[0]
    shares = tile.shares(math.ceil(m / tile.block_m), weight.n, weight.packed.shape[0], at.processors)
    partial = y if shares == 1 else x.new_empty(shares, m, weight.n, dtype=torch.float32)
    grid = (math.ceil(weight.n / tile.block_n), shares, math.ceil(m / tile.block_m))
    arguments = {
        "x_ptr": x,
        "bias_ptr": x if bias is None else bias,
        "y_ptr": partial,
        "m": m,
        **weight.operands(at),
        **tile.constants(weight.n),
        "partial": shares > 1,
        "has_bias": bias is not None,
        "widen": interpreted(),
        **at.launch(),
    }
    call = Call(gemm, grid, arguments)
    return [call] if shares == 1 else [call, join(y, partial, bias, at)]


def join(y: Tensor, partial: Tensor, bias: Tensor | None, at: Target) -> Call:
    """The call that writes ``partial.sum(0) + bias`` to ``y`` ``(M, N)``: ``(shares, M, N)`` float32 added
    first to last."""
    from awqc.kernels.jit.gemm_triton import add_shares

    block = 256 if y.numel() <= 256 * at.processors else 1024
    arguments = {
        "partial_ptr": partial,
        "bias_ptr": partial if bias is None else bias,
        "y_ptr": y,
        "size": y.numel(),
        "n": y.shape[1],
        "shares": partial.shape[0],
        "block": block,
        "has_bias": bias is not None,
        **at.launch(),
    }
    return Call(add_shares, (math.ceil(y.numel() / block),), arguments)


def dense(weight: Weight, dtype: torch.dtype) -> Tensor:
    """The weight ``(N, K)`` in ``dtype``."""
    out = weight.scales.new_empty(weight.n, weight.k, dtype=dtype)
    written(weight, out, target(out.device)).launch()
    return out


def written(weight: Weight, out: Tensor, at: Target) -> Call:
    """The call that writes the weight to ``out`` ``(N, K)``."""
    from awqc.kernels.jit.dequantize_triton import dequantize

    block_n = 16
    grid = (weight.packed.shape[0], math.ceil(weight.n / block_n))
    cut = {"block_n": block_n, "num_warps": 2}
    return Call(dequantize, grid, {"weight_ptr": out, **weight.operands(at), **cut}, results=("weight_ptr",))


def choose(tokens: int, weight: Weight, dtype: torch.dtype) -> Tile | Cut | None:
    """How to multiply ``tokens``; None for the dense route. Measured first, where the autotuner is on."""
    device, at = weight.packed.device, hardware(weight.packed.device)
    if may_tune(device) and configs.tuned(key := _key(weight, dtype), at.name) is None:
        configs.keep(key, device, tune(weight, dtype))
    return route(tokens, weight, dtype, at)


def route(tokens: int, weight: Weight, dtype: torch.dtype, at: Hardware) -> Tile | Cut | None:
    """How ``tokens`` are multiplied on ``at``; None for the dense route."""
    if (cut := triton_many.fastest(tokens, weight, at)) is not None:
        return cut
    table = configs.tuned(_key(weight, dtype), at.name) or configs.measured(NAME, at.name)
    found = configs.entry(table, tokens)
    return None if found is None else weight.fitting(Tile(**found), at)


def _key(weight: Weight, dtype: torch.dtype) -> str:
    return f"{NAME} {weight.n}x{weight.k} g{weight.group_size} {dtype}"


def tune(weight: Weight, dtype: torch.dtype) -> configs.Table:
    """Measure every candidate that fits this device, against the dense route too: up to a minute.

    The numbers of tokens are tried in ascending order until the dense route is the faster one.
    """
    copies = [
        Weight(weight.packed.clone(), weight.scales, weight.zeros, weight.n, weight.k, weight.group_size)
        for _ in range(max(2, math.ceil(2e8 / weight.packed.nbytes)))
    ]

    def attempt(x: Tensor, tile: Tile | None, i: int) -> Tensor:
        return F.linear(x, dense(copies[i], dtype)) if tile is None else multiply(x, copies[i], None, tile)

    at = hardware(weight.packed.device)
    table: dict[int, Mapping[str, int]] = {}
    for tokens in TOKENS:
        if triton_many.fastest(tokens, weight, at) is not None:
            continue
        x = torch.randn(tokens, weight.k, dtype=dtype, device=weight.packed.device)
        own = [tile for tile in candidates(tokens) if weight.fitting(tile, at) == tile]
        tiles: list[Tile | None] = [None, *own]
        tile = fastest({tile: functools.partial(attempt, x, tile) for tile in tiles}, len(copies))
        if tile is None:
            break
        table[tokens] = asdict(tile)
    return table


def candidates(tokens: int) -> list[Tile]:
    """Tiles worth trying for ``tokens``."""
    few = [(32, 2), (64, 4)] if tokens <= 16 else [(64, 4), (128, 4), (128, 8)]
    return [
        Tile(block_m, block_n, warps, stages, programs)
        for block_m in {min(tokens, 64), min(tokens, 128)}
        for block_n, warps in few
        for stages in (2, 3, 4)
        for programs in ((2, 4, 8, 12) if tokens <= 64 else (1, 2, 3))
    ]


def qlinear_triton(
    x: Tensor,
    packed: Tensor,
    scales: Tensor,
    zeros: Tensor,
    bias: Tensor | None,
    out_features: int,
    group_size: int,
) -> Tensor:
    """``x @ W.T + bias`` for ``x`` ``(..., K)`` of any floating dtype and strides; ``(..., N)`` like ``x``.

    Args:
        packed: ``(blocks, rows, width)`` int16, see :mod:`awqc.kernels.planes`.
        scales: ``(G, rows)`` floating.
        zeros: ``(G, rows)`` uint8.
        bias: ``(N,)`` floating, or None.
        out_features: ``N``.
        group_size: channels that share a scale; -1 for the whole row.
    """
    tokens = x.reshape(-1, x.shape[-1]).contiguous()
    weight = Weight(packed, scales, zeros, out_features, x.shape[-1], group_size)
    if tokens.shape[0] == 0:
        y = tokens.new_empty(0, out_features)
    elif x.dtype in (torch.float16, torch.bfloat16) and (how := choose(tokens.shape[0], weight, x.dtype)):
        y = multiply(tokens, weight, bias, how)
    else:
        y = F.linear(tokens, dense(weight, x.dtype), None if bias is None else bias.to(x.dtype))
    return y.view(*x.shape[:-1], out_features)


LIBRARY.impl("qlinear_triton", qlinear_triton, "CUDA")
LIBRARY.impl("qlinear_triton", qlinear_triton, "CPU")


@describes(torch.ops.awqc.qlinear_triton.default)
def describe(
    at: Hardware,
    x: Tensor,
    packed: Tensor,
    scales: Tensor,
    zeros: Tensor,
    bias: Tensor | None,
    out_features: int,
    group_size: int,
) -> list[Launch]:
    """The launches of :func:`qlinear_triton` for float16 and bfloat16."""
    rows = x.reshape(-1, x.shape[-1])
    weight = Weight(packed, scales, zeros, out_features, x.shape[-1], group_size)
    how, out = route(rows.shape[0], weight, x.dtype, at), rows.new_empty(rows.shape[0], out_features)
    if how is None:
        full = packed.new_empty(out_features, x.shape[-1], dtype=x.dtype)
        reason = triton_many.missing(weight, at) if at.has_bulk_copies else None
        config = {} if reason is None else {"without many_gluon.py, which": reason}
        return [
            written(weight, full, Target.of(at)).describe(),
            Launch("cuBLAS", nbytes(rows, full, bias), nbytes(out), config=config),
        ]
    return [call.describe() for call in calls(rows, weight, bias, out, how, Target.of(at))]


@torch.library.register_fake("awqc::qlinear_triton", lib=LIBRARY)
def _(
    x: Tensor,
    packed: Tensor,
    scales: Tensor,
    zeros: Tensor,
    bias: Tensor | None,
    out_features: int,
    group_size: int,
) -> Tensor:
    return x.new_empty((*x.shape[:-1], out_features))


@register_kernel("qlinear")
class TritonGemm:
    """The limits of ``awqc::qlinear_triton``, its packed form and the way back."""

    op: ClassVar[torch._ops.OpOverload] = torch.ops.awqc.qlinear_triton.default

    @staticmethod
    def legal(
        n: int, k: int, bits: int, group_size: int, dtype: torch.dtype, device: torch.device
    ) -> str | None:
        """Why this kernel cannot run a weight ``(n, k)``, in one line; None if it can."""
        if importlib.util.find_spec("triton") is None:
            return "needs triton, which is not installed"
        if device.type != "cuda" and not (device.type == "cpu" and interpreted()):
            return f"runs on cuda, not on {device}"
        if dtype not in (torch.float16, torch.bfloat16):
            return f"multiplies float16 or bfloat16 activations, not {dtype}"
        if bits > 4:
            return f"holds codes of at most 4 bits, not {bits}"
        if plane_width(k, group_size) is None:
            return f"needs groups of a multiple of 16 input channels, not group_size={group_size} over {k}"
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
            group_size: of a multiple of 16 channels, or the whole row.
        """
        n, k = codes.shape
        width = plane_width(k, group_size)
        assert width is not None, "pack() is for legal shapes"
        tensors = {
            "packed": pack_planes(codes, width),
            "scales": pack_groups(scales),
            "zeros": pack_groups(zeros.to(torch.uint8)),
            "bias": bias,
        }
        return tensors, (n, group_size)

    @staticmethod
    def unpack(
        packed: Tensor, scales: Tensor, zeros: Tensor, n: int, k: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Codes ``(n, k)``, scales and zeros ``(n, G)`` that :meth:`pack` was given."""
        return unpack_planes(packed, n, k), unpack_groups(scales, n), unpack_groups(zeros, n)
