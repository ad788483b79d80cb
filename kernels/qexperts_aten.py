"""``awqc::qexperts_cpu``: the linears of several experts over ATen's 4-bit kernel for CPUs.

Each expert is a linear of its own, run as ``awqc::qlinear_cpu`` runs it: the 4-bit kernel for few rows, a
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
from awqc.kernels.qlinear_aten import AtenInt4, qlinear_cpu
from awqc.kernels.qlinear_aten import describe as describe_linear
from awqc.kernels.registry import register_kernel

LIBRARY.define(
    "qexperts_cpu(Tensor x, Tensor? offsets, Tensor packed, Tensor scales_and_zeros, Tensor? dense, "
    "int group_size) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def qexperts_cpu(
    x: Tensor,
    offsets: Tensor | None,
    packed: Tensor,
    scales_and_zeros: Tensor,
    dense: Tensor | None,
    group_size: int,
) -> Tensor:
    """As :func:`awqc.kernels.qexperts.qexperts`, on packed weights.

    Args:
        packed: ``(E, N, K / 2)`` uint8.
        scales_and_zeros: ``(E, K / group_size, N, 2)`` bfloat16.
        dense: ``(E, N, K)`` bfloat16, or None.
        group_size: of the kernel, see :mod:`awqc.kernels.qlinear_aten`.
    """
    y = x.new_zeros(*x.shape[:-1], packed.shape[1])
    for expert, rows, out in shares(x, y, offsets):
        weight = None if dense is None else dense[expert]
        out.copy_(qlinear_cpu(rows, packed[expert], scales_and_zeros[expert], weight, None, group_size))
    return y


LIBRARY.impl("qexperts_cpu", qexperts_cpu, "CPU")


@describes(torch.ops.awqc.qexperts_cpu.default)
def describe(
    at: Hardware,
    x: Tensor,
    offsets: Tensor | None,
    packed: Tensor,
    scales_and_zeros: Tensor,
    dense: Tensor | None,
    group_size: int,
) -> list[Launch]:
    """The routine that :func:`qexperts_cpu` calls for each expert that has rows: as many as can have some."""
    experts, rows = busiest(x, offsets, packed.shape[0])
    weight = None if dense is None else dense[0]
    one = describe_linear(at, rows, packed[0], scales_and_zeros[0], weight, None, group_size)
    return one * experts


@torch.library.register_fake("awqc::qexperts_cpu", lib=LIBRARY)
def _(
    x: Tensor,
    offsets: Tensor | None,
    packed: Tensor,
    scales_and_zeros: Tensor,
    dense: Tensor | None,
    group_size: int,
) -> Tensor:
    return x.new_empty((*x.shape[:-1], packed.shape[1]))


@register_kernel("qexperts")
class AtenInt4Experts:
    """Packing for ``awqc::qexperts_cpu``: that of :class:`AtenInt4` for every expert."""

    op: ClassVar[torch._ops.OpOverload] = torch.ops.awqc.qexperts_cpu.default
    legal = staticmethod(AtenInt4.legal)

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
        """The op's tensors by argument name, and its group size.

        Args:
            codes: ``(E, N, K)`` uint8 below ``2 ** bits``.
            scales, zeros: ``(E, N, G)``.
            bias: None: experts have theirs outside.
            bits, group_size, dense: as for :meth:`AtenInt4.pack`.
        """
        assert bias is None
        return pack_each(AtenInt4.pack, codes, scales, zeros, bits, group_size, dense=dense)

    @staticmethod
    def unpack(packed: Tensor, bits: int) -> Tensor:
        """The codes ``(E, N, K)`` uint8 that :meth:`pack` was given."""
        return torch.stack([AtenInt4.unpack(expert, bits) for expert in packed])
