"""``awqc::qexperts_llvm``: the linears of several experts over dot products of bytes, compiled by LLVM.

Each expert is a linear of its own, run as ``awqc::qlinear_llvm`` runs it: dot products for few rows, a
bfloat16 matmul for more, which is what decoding and prompts give to an expert.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from awqc.kernels.hardware import Hardware
from awqc.kernels.launch import Launch, describes
from awqc.kernels.qexperts import busiest, pack_each, shares
from awqc.kernels.qlinear import LIBRARY
from awqc.kernels.qlinear_llvm import LlvmInt4, qlinear_llvm
from awqc.kernels.qlinear_llvm import describe as describe_linear
from awqc.kernels.registry import register_kernel

LIBRARY.define(
    "qexperts_llvm(Tensor x, Tensor? offsets, Tensor packed, Tensor scales, Tensor zeros, "
    "Tensor? dense, int out_features, int chunk) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def qexperts_llvm(
    x: Tensor,
    offsets: Tensor | None,
    packed: Tensor,
    scales: Tensor,
    zeros: Tensor,
    dense: Tensor | None,
    out_features: int,
    chunk: int,
) -> Tensor:
    """As :func:`awqc.kernels.qexperts.qexperts`, on packed weights.

    Args:
        packed, scales, zeros, dense: of :func:`awqc.kernels.qlinear_llvm.qlinear_llvm`, with ``E`` in front.
        out_features, chunk: as there.
    """
    y = x.new_zeros(*x.shape[:-1], out_features)
    for expert, rows, out in shares(x, y, offsets):
        weight = None if dense is None else dense[expert]
        parts = packed[expert], scales[expert], zeros[expert]
        out.copy_(qlinear_llvm(rows, *parts, weight, None, out_features, chunk))
    return y


LIBRARY.impl("qexperts_llvm", qexperts_llvm, "CPU")


@describes(torch.ops.awqc.qexperts_llvm.default)
def describe(
    at: Hardware,
    x: Tensor,
    offsets: Tensor | None,
    packed: Tensor,
    scales: Tensor,
    zeros: Tensor,
    dense: Tensor | None,
    out_features: int,
    chunk: int,
) -> list[Launch]:
    """The routine that :func:`qexperts_llvm` calls for each expert that may have rows."""
    experts, rows = busiest(x, offsets, packed.shape[0])
    weight = None if dense is None else dense[0]
    one = describe_linear(at, rows, packed[0], scales[0], zeros[0], weight, None, out_features, chunk)
    return one * experts


@torch.library.register_fake("awqc::qexperts_llvm", lib=LIBRARY)
def _(
    x: Tensor,
    offsets: Tensor | None,
    packed: Tensor,
    scales: Tensor,
    zeros: Tensor,
    dense: Tensor | None,
    out_features: int,
    chunk: int,
) -> Tensor:
    return x.new_empty((*x.shape[:-1], out_features))


@register_kernel("qexperts")
class LlvmInt4Experts:
    """Packing for ``awqc::qexperts_llvm``: that of :class:`LlvmInt4` for every expert."""

    op: ClassVar[torch._ops.OpOverload] = torch.ops.awqc.qexperts_llvm.default
    legal = staticmethod(LlvmInt4.legal)

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
    ) -> tuple[Mapping[str, Tensor | None], tuple[Any, ...]]:
        """The op's tensors by argument name, ``N``, and the chunk.

        Args:
            codes: ``(E, N, K)`` uint8 below ``2 ** bits``.
            scales, zeros: ``(E, N, G)``.
            bias: None: experts have theirs outside.
            bits, group_size, dense: as for :meth:`LlvmInt4.pack`.
        """
        assert bias is None
        return pack_each(LlvmInt4.pack, codes, scales, zeros, bits, group_size, dense=dense)

    @staticmethod
    def unpack(
        packed: Tensor, scales: Tensor, zeros: Tensor, n: int, k: int, group_size: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The codes ``(E, N, K)``, scales and zeros ``(E, N, G)`` of :meth:`pack`."""
        experts = [
            LlvmInt4.unpack(*parts, n, k, group_size) for parts in zip(packed, scales, zeros, strict=True)
        ]
        codes, scales, zeros = (torch.stack(parts) for parts in zip(*experts, strict=True))
        return codes, scales, zeros
