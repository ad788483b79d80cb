"""Backend ``triton``: Triton kernels for GPUs of NVIDIA and AMD."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from awqc.backend import Backend, LinearShape, PackedLinear, register_backend
from awqc.kernels.qlinear_triton import TritonGemm, interpreted
from awqc.quantized import QuantizedWeight


@register_backend("triton")
class TritonBackend(Backend):
    """Speed on any GPU that Triton compiles for, with codes of at most 4 bits, at half a byte a code."""

    #: Interpreted kernels are there to be tested: nobody else should get them unasked.
    priority: ClassVar[int] = -1 if interpreted() else 6

    def refuses(self, shape: LinearShape) -> str | None:
        scheme = shape.scheme
        return TritonGemm.legal(
            shape.out_features, shape.in_features, scheme.bits, scheme.group_size, shape.dtype, shape.device
        )

    def pack(self, weight: QuantizedWeight, bias: Tensor | None, dtype: torch.dtype) -> PackedLinear:
        scheme = weight.scheme
        tensors, constants = TritonGemm.pack(
            weight.codes, weight.scales, weight.zeros, bias, scheme.bits, scheme.group_size
        )
        return PackedLinear(op=TritonGemm.op, tensors=tensors, constants=constants)

    def unpack(self, packed: PackedLinear, shape: LinearShape) -> tuple[QuantizedWeight, Tensor | None]:
        codes, scales, zeros = TritonGemm.unpack(
            packed.tensor("packed"),
            packed.tensor("scales"),
            packed.tensor("zeros"),
            shape.out_features,
            shape.in_features,
        )
        return QuantizedWeight(codes, scales, zeros, shape.scheme), packed.tensors["bias"]
