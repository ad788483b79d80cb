"""Backend ``marlin``: CUDA kernels for tensor cores, from single tokens to long prompts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from awqc.backend import Backend, LinearShape, PackedLinear, register_backend
from awqc.backends.triton import TritonBackend, pack_experts
from awqc.kernels import marlin_layout
from awqc.kernels.nvrtc import available
from awqc.kernels.qlinear_marlin import Marlin
from awqc.quantized import QuantizedWeight


@register_backend("marlin")
@dataclass(frozen=True)
class MarlinBackend(Backend):
    """Speed on NVIDIA GPUs from Ampere on, for codes of at most 4 bits."""

    priority: ClassVar[int] = 30

    runs_experts: ClassVar[bool] = True

    def refuses(self, shape: LinearShape) -> str | None:
        reason = Marlin.legal(
            shape.out_features,
            shape.in_features,
            shape.scheme.bits,
            shape.scheme.group_size,
            shape.dtype,
            shape.device,
        )
        if reason is None and not available():
            return "needs NVRTC, which torch's CUDA builds bring along: pip install nvidia-cuda-nvrtc"
        if reason is None and shape.expert_count is not None:
            return TritonBackend().refuses(shape)
        return reason

    def pack(self, weight: QuantizedWeight, bias: Tensor | None, dtype: torch.dtype) -> PackedLinear:
        if weight.expert_count is not None:
            return pack_experts(weight, dtype)
        scheme = weight.scheme
        tensors, constants = Marlin.pack(
            weight.codes, weight.scales, weight.zeros, bias, scheme.bits, scheme.group_size
        )
        exact = weight.scales.dtype in (torch.float16, torch.bfloat16)
        return PackedLinear(
            op=Marlin.op,
            tensors=tensors,
            constants=constants,
            kept={} if exact else {"scales": weight.scales},
            notes=() if exact else (f"scales are rounded from {weight.scales.dtype} to float16",),
        )

    def unpack(self, packed: PackedLinear, shape: LinearShape) -> tuple[QuantizedWeight, Tensor | None]:
        if shape.expert_count is not None:
            return TritonBackend().unpack(packed, shape)
        scale_dtype = torch.bfloat16 if packed.constants[2] else torch.float16
        codes, scales, zeros = marlin_layout.unpack(
            packed.tensor("packed"),
            shape.out_features,
            shape.in_features,
            shape.scheme.group_size,
            scale_dtype,
        )
        scales = packed.kept.get("scales", scales)
        return QuantizedWeight(codes, scales, zeros, shape.scheme), packed.tensors["bias"]
