"""Backend ``reference``: dequantize and multiply. Runs anywhere; slow; what the others are held to."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from awqc.backend import Backend, LinearShape, PackedLinear, register_backend
from awqc.kernels import qexperts, qlinear  # noqa: F401  define the ops
from awqc.quantized import QuantizedWeight


@register_backend("reference")
class ReferenceBackend(Backend):
    """Keeps the canonical tensors, one byte a code, and dequantizes at every call."""

    runs_experts: ClassVar[bool] = True

    def refuses(self, shape: LinearShape) -> str | None:
        if not shape.dtype.is_floating_point:
            return f"multiplies floating-point activations, not {shape.dtype}"
        return None

    def pack(self, weight: QuantizedWeight, bias: Tensor | None, dtype: torch.dtype) -> PackedLinear:
        tensors = {"codes": weight.codes, "scales": weight.scales, "zeros": weight.zeros}
        constants = (weight.scheme.group(weight.in_features),)
        if weight.expert_count is not None:
            return PackedLinear(torch.ops.awqc.qexperts.default, tensors, constants)
        return PackedLinear(torch.ops.awqc.qlinear.default, {**tensors, "bias": bias}, constants)

    def unpack(self, packed: PackedLinear, shape: LinearShape) -> tuple[QuantizedWeight, Tensor | None]:
        codes, scales, zeros = (packed.tensor(name) for name in ("codes", "scales", "zeros"))
        return QuantizedWeight(codes, scales, zeros, shape.scheme), packed.tensors.get("bias")
