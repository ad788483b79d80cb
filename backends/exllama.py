"""Backend ``exllama``: portable CUDA kernels that use no matrix instructions."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from awqc.backend import Backend, LinearShape, PackedLinear, register_backend
from awqc.backends.triton import TritonBackend, pack_experts
from awqc.kernels.qlinear_exllama import ExLlama
from awqc.quantized import QuantizedWeight


@register_backend("exllama")
class ExLlamaBackend(Backend):
    """Decoding on GPUs without fast 16-bit matrix units, with codes of at most 4 bits."""

    priority: ClassVar[int] = 4

    runs_experts: ClassVar[bool] = True

    def refuses(self, shape: LinearShape) -> str | None:
        scheme = shape.scheme
        reason = ExLlama.legal(
            shape.out_features, shape.in_features, scheme.bits, scheme.group_size, shape.dtype, shape.device
        )
        if reason is None and shape.expert_count is not None:
            return TritonBackend().refuses(shape)
        return reason

    def pack(self, weight: QuantizedWeight, bias: Tensor | None, dtype: torch.dtype) -> PackedLinear:
        if weight.expert_count is not None:
            return pack_experts(weight, dtype)
        scheme = weight.scheme
        tensors, constants = ExLlama.pack(
            weight.codes, weight.scales, weight.zeros, bias, scheme.bits, scheme.group_size
        )
        return PackedLinear(op=ExLlama.op, tensors=tensors, constants=constants)

    def unpack(self, packed: PackedLinear, shape: LinearShape) -> tuple[QuantizedWeight, Tensor | None]:
        if shape.expert_count is not None:
            return TritonBackend().unpack(packed, shape)
        codes, scales, zeros = ExLlama.unpack(
            packed.tensor("words"),
            packed.tensor("scales"),
            packed.tensor("zeros"),
            shape.out_features,
            shape.in_features,
        )
        return QuantizedWeight(codes, scales, zeros, shape.scheme), packed.tensors["bias"]
