"""Backend ``triton``: Triton kernels for GPUs of NVIDIA and AMD."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor

from awqc.backend import Backend, LinearShape, PackedLinear, register_backend
from awqc.kernels.qexperts_triton import TritonExperts
from awqc.kernels.qlinear_triton import TritonGemm
from awqc.kernels.triton_call import interpreted
from awqc.quantized import QuantizedWeight


@register_backend("triton")
class TritonBackend(Backend):
    """Speed on any GPU that Triton compiles for, with codes of at most 4 bits, at half a byte a code."""

    #: Interpreted kernels are there to be tested: nobody else should get them unasked.
    priority: ClassVar[int] = -1 if interpreted() else 6
    runs_experts: ClassVar[bool] = True

    def refuses(self, shape: LinearShape) -> str | None:
        scheme = shape.scheme
        return TritonGemm.legal(
            shape.out_features, shape.in_features, scheme.bits, scheme.group_size, shape.dtype, shape.device
        )

    def pack(self, weight: QuantizedWeight, bias: Tensor | None, dtype: torch.dtype) -> PackedLinear:
        scheme = weight.scheme
        kernel = TritonGemm if weight.expert_count is None else TritonExperts
        tensors, constants = kernel.pack(
            weight.codes, weight.scales, weight.zeros, bias, scheme.bits, scheme.group_size
        )
        return PackedLinear(op=kernel.op, tensors=tensors, constants=constants)

    def unpack(self, packed: PackedLinear, shape: LinearShape) -> tuple[QuantizedWeight, Tensor | None]:
        kernel = TritonGemm if shape.expert_count is None else TritonExperts
        codes, scales, zeros = kernel.unpack(
            packed.tensor("packed"),
            packed.tensor("scales"),
            packed.tensor("zeros"),
            shape.out_features,
            shape.in_features,
        )
        return QuantizedWeight(codes, scales, zeros, shape.scheme), packed.tensors.get("bias")


def pack_experts(weight: QuantizedWeight, dtype: torch.dtype) -> PackedLinear:
    """The ``(E, N, K)`` of experts for a backend without a kernel of its own for them."""
    packed = TritonBackend().pack(weight, None, dtype)
    return replace(packed, notes=("the linears of experts run on the Triton kernel",))
