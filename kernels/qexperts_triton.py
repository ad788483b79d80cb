"""``awqc::qexperts_triton``: the linears of several experts in Triton, all in one launch.

The weights of each expert are packed as those of a linear (:mod:`awqc.kernels.planes`), and
``jit/experts_triton.py`` finds out on the device which expert a tile of tokens belongs to, so that nothing
waits for the router and a CUDA graph may hold the call. Sums are float32, in an order that the shape and the
launch configuration decide: the same input gives the same bits.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor

from awqc.kernels import configs
from awqc.kernels.hardware import Hardware, hardware
from awqc.kernels.launch import Launch, describes, nbytes
from awqc.kernels.planes import pack_groups, pack_planes, plane_width, unpack_groups, unpack_planes
from awqc.kernels.qexperts import busiest, qexperts
from awqc.kernels.qlinear import LIBRARY
from awqc.kernels.qlinear_triton import TritonGemm, join
from awqc.kernels.registry import register_kernel
from awqc.kernels.triton_call import Call, Target, interpreted, target
from awqc.kernels.triton_tile import Tile
from awqc.kernels.triton_weight import Weight

#: The name under which configurations are kept, by tokens of an expert on average.
NAME = "qexperts_triton"

LIBRARY.define(
    "qexperts_triton(Tensor x, Tensor? offsets, Tensor packed, Tensor scales, Tensor zeros, "
    "int out_features, int group_size) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def multiply(x: Tensor, offsets: Tensor | None, weight: Weight, tile: Tile) -> Tensor:
    """The products ``(S, N)`` of ``x`` ``(S, K)``, contiguous float16 or bfloat16 and sorted by expert.

    Args:
        offsets: ``(E,)`` int32, or None for equally many rows of each expert.
        weight: of E experts.
    """
    y = x.new_empty(x.shape[0], weight.n)
    for call in product(x, offsets, weight, y, tile, target(x.device)):
        call.launch()
    return y


def product(
    x: Tensor, offsets: Tensor | None, weight: Weight, y: Tensor, tile: Tile, at: Target
) -> list[Call]:
    """The calls that write the products to ``y`` ``(S, N)``."""
    from awqc.kernels.jit.experts_triton import experts_gemm

    m, experts = x.shape[0], weight.packed.shape[0]
    # At most: every expert has rows, and its last tile is not full; rows of no expert are one more.
    token_tiles = min(m, m // tile.block_m + experts + 1)
    shares = tile.shares(token_tiles, weight.n, weight.packed.shape[1], at.processors)
    partial = y if shares == 1 else x.new_empty(shares, m, weight.n, dtype=torch.float32)
    arguments = dict(
        x_ptr=x,
        ends_ptr=x if offsets is None else offsets,
        y_ptr=partial,
        m=m,
        each=m // experts,
        **weight.operands(at),
        **tile.constants(weight.n),
        experts=experts,
        padded=1 << experts.bit_length(),
        has_ends=offsets is not None,
        partial=shares > 1,
        widen=interpreted(),
        **at.launch(),
    )
    call = Call(experts_gemm, (math.ceil(weight.n / tile.block_n), shares, token_tiles), arguments)
    return [call] if shares == 1 else [call, join(y, partial, None, at)]


def choose(tokens: int, weight: Weight, at: Hardware) -> Tile:
    """The configuration for ``tokens`` rows of the experts of ``weight``: that of their average."""
    table = configs.measured(NAME, at.name)
    found = configs.entry(table, math.ceil(tokens / weight.packed.shape[0])) or table[max(table)]
    return weight.fitting(Tile(**found), at)


def qexperts_triton(
    x: Tensor,
    offsets: Tensor | None,
    packed: Tensor,
    scales: Tensor,
    zeros: Tensor,
    out_features: int,
    group_size: int,
) -> Tensor:
    """As :func:`awqc.kernels.qexperts.qexperts`, on packed weights.

    Only float16 and bfloat16 activations are fast; others are multiplied as the reference does.

    Args:
        packed: ``(E, blocks, rows, width)`` int16, see :mod:`awqc.kernels.planes`.
        scales: ``(E, G, rows)`` floating.
        zeros: ``(E, G, rows)`` uint8.
        out_features: ``N``.
        group_size: channels that share a scale; -1 for the whole row.
    """
    k = x.shape[-1]
    if x.dtype not in (torch.float16, torch.bfloat16):
        parts = TritonExperts.unpack(packed, scales, zeros, out_features, k)
        return qexperts(x, offsets, *parts, group_size)
    tokens = x.reshape(-1, k).contiguous()
    if tokens.shape[0] == 0:
        return x.new_empty(*x.shape[:-1], out_features)
    ends = None if offsets is None else offsets.to(torch.int32).contiguous()
    weight = Weight(packed, scales, zeros, out_features, k, group_size)
    y = multiply(tokens, ends, weight, choose(tokens.shape[0], weight, hardware(x.device)))
    return y.view(*x.shape[:-1], out_features)


LIBRARY.impl("qexperts_triton", qexperts_triton, "CUDA")
LIBRARY.impl("qexperts_triton", qexperts_triton, "CPU")


@describes(torch.ops.awqc.qexperts_triton.default)
def describe(
    at: Hardware,
    x: Tensor,
    offsets: Tensor | None,
    packed: Tensor,
    scales: Tensor,
    zeros: Tensor,
    out_features: int,
    group_size: int,
) -> list[Launch]:
    """The launches of :func:`qexperts_triton` for float16 and bfloat16; of the weights, those of as many
    experts as can have rows are read."""
    rows, count = x.reshape(-1, x.shape[-1]), packed.shape[0]
    out, ends = rows.new_empty(len(rows), out_features), None if offsets is None else offsets.int()
    weight = Weight(packed, scales, zeros, out_features, x.shape[-1], group_size)
    calls = product(rows, ends, weight, out, choose(len(rows), weight, at), Target.of(at))
    first, *others = [call.describe() for call in calls]
    unread = nbytes(packed, scales, zeros) * (count - busiest(x, offsets, count)[0]) // count
    return [replace(first, reads=first.reads - unread), *others]


@torch.library.register_fake("awqc::qexperts_triton", lib=LIBRARY)
def _(
    x: Tensor,
    offsets: Tensor | None,
    packed: Tensor,
    scales: Tensor,
    zeros: Tensor,
    out_features: int,
    group_size: int,
) -> Tensor:
    return x.new_empty((*x.shape[:-1], out_features))


@register_kernel("qexperts")
class TritonExperts:
    """Packing for ``awqc::qexperts_triton``: that of :class:`TritonGemm` for every expert."""

    op: ClassVar[torch._ops.OpOverload] = torch.ops.awqc.qexperts_triton.default
    legal = staticmethod(TritonGemm.legal)

    @staticmethod
    def pack(
        codes: Tensor, scales: Tensor, zeros: Tensor, bias: Tensor | None, bits: int, group_size: int
    ) -> tuple[dict[str, Tensor | None], tuple[int, int]]:
        """The op's tensors by argument name, and the numbers that follow them.

        Args:
            codes: ``(E, N, K)`` uint8 below 16.
            scales, zeros: ``(E, N, G)``; scales keep their dtype, zeros are below 16.
            bias: None: experts have theirs outside.
            bits, group_size: as for :meth:`TritonGemm.pack`.
        """
        assert bias is None
        width = plane_width(codes.shape[-1], group_size)
        assert width is not None, "pack() is for legal shapes"
        tensors: dict[str, Tensor | None] = {
            "packed": pack_planes(codes, width),
            "scales": pack_groups(scales),
            "zeros": pack_groups(zeros.to(torch.uint8)),
        }
        return tensors, (codes.shape[1], group_size)

    @staticmethod
    def unpack(
        packed: Tensor, scales: Tensor, zeros: Tensor, n: int, k: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Codes ``(E, n, k)``, scales and zeros ``(E, n, G)`` that :meth:`pack` was given."""
        return unpack_planes(packed, n, k), unpack_groups(scales, n), unpack_groups(zeros, n)
