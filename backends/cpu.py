"""Backend ``cpu``: 4-bit kernels for decoding, a bfloat16 matmul for longer inputs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from awqc.backend import Backend, LinearShape, PackedLinear, register_backend
from awqc.errors import ConfigError
from awqc.kernels import llvm
from awqc.kernels.dot_products import TYPES
from awqc.kernels.qexperts_aten import AtenInt4Experts
from awqc.kernels.qexperts_llvm import LlvmInt4Experts
from awqc.kernels.qlinear_aten import INT4_ROWS, AtenInt4
from awqc.kernels.qlinear_llvm import LlvmInt4, dot_rows
from awqc.quantized import QuantizedWeight


@register_backend("cpu")
@dataclass(frozen=True)
class CpuBackend(Backend):
    """Speed on CPUs, for codes of at most 4 bits: awqc's own kernel where there is an LLVM to compile it,
    ATen's otherwise.

    Args:
        prefill: what serves inputs of more than 8 or 16 rows (prompts, batches; how many depends on the
            CPU, and the report says it). The 4-bit kernels cost the same for every row, so that at 128 rows
            they take several times as long as a bfloat16 matmul. ``"dense"`` keeps a bfloat16 copy of the
            weight for them, at 2 bytes a weight on top of the half byte of the packed codes: never slower
            than a bfloat16 linear, and larger than one. ``"packed"`` keeps the packed codes alone: a quarter
            of the memory, slower on long inputs.

    Raises:
        ConfigError: for another value of ``prefill``.
    """

    priority: ClassVar[int] = 10
    runs_experts: ClassVar[bool] = True
    prefill: Literal["dense", "packed"] = "dense"

    def __post_init__(self) -> None:
        if self.prefill not in ("dense", "packed"):
            raise ConfigError(f"prefill={self.prefill!r}: the cpu backend knows 'dense' and 'packed'")

    def refuses(self, shape: LinearShape) -> str | None:
        scheme = shape.scheme
        limits = (
            shape.out_features,
            shape.in_features,
            scheme.bits,
            scheme.group_size,
            shape.dtype,
            shape.device,
        )
        own, aten = LlvmInt4.legal(*limits), AtenInt4.legal(*limits)
        if own is None or aten is None:
            return None
        return aten if llvm.missing() else own

    def pack(self, weight: QuantizedWeight, bias: Tensor | None, dtype: torch.dtype) -> PackedLinear:
        scheme = weight.scheme
        shape = (weight.out_features, weight.in_features, scheme.bits, scheme.group_size)
        reason = LlvmInt4.legal(*shape, dtype, torch.device("cpu"))
        return self._aten(weight, bias, dtype, reason) if reason else self._llvm(weight, bias)

    def _llvm(self, weight: QuantizedWeight, bias: Tensor | None) -> PackedLinear:
        scheme = weight.scheme
        kernel = LlvmInt4 if weight.expert_count is None else LlvmInt4Experts
        tensors, constants = kernel.pack(
            weight.codes,
            weight.scales,
            weight.zeros,
            bias,
            scheme.bits,
            scheme.group_size,
            dense=self.prefill == "dense",
        )
        notes = ["activations are rounded to 16 bits of the largest of at most 256 channels"]
        if self.prefill == "dense":
            notes.append(f"a bfloat16 copy of the weight serves inputs of more than {dot_rows()} rows")
        # Of other dtypes the kernel holds a rounded form.
        exact = str(weight.scales.dtype).removeprefix("torch.") in TYPES and weight.zeros.dtype == torch.uint8
        kept = {} if exact else {"given_scales": weight.scales, "given_zeros": weight.zeros}
        return PackedLinear(kernel.op, tensors, constants, kept, tuple(notes))

    def _aten(
        self, weight: QuantizedWeight, bias: Tensor | None, dtype: torch.dtype, reason: str
    ) -> PackedLinear:
        dense = self.prefill == "dense"
        scheme = weight.scheme
        kernel = AtenInt4 if weight.expert_count is None else AtenInt4Experts
        tensors, constants = kernel.pack(
            weight.codes, weight.scales, weight.zeros, bias, scheme.bits, scheme.group_size, dense=dense
        )
        notes = [f"ATen's 4-bit kernel runs it: awqc's own {reason}", "scales are rounded to bfloat16"]
        if dtype != torch.bfloat16:
            notes.append(f"activations are rounded from {dtype} to bfloat16")
        if dense:
            notes.append(f"a bfloat16 copy of the weight serves inputs of more than {INT4_ROWS} rows")
        return PackedLinear(
            op=kernel.op,
            tensors=tensors,
            constants=constants,
            # The op's own scales are rounded, so the exact ones are kept for the way back.
            kept={"scales": weight.scales, "zeros": weight.zeros},
            notes=tuple(notes),
        )

    def unpack(self, packed: PackedLinear, shape: LinearShape) -> tuple[QuantizedWeight, Tensor | None]:
        scheme, kept, bias = shape.scheme, packed.kept, packed.tensors.get("bias")
        one = shape.expert_count is None
        if packed.op in (LlvmInt4.op, LlvmInt4Experts.op):
            codes, scales, zeros = (LlvmInt4 if one else LlvmInt4Experts).unpack(
                packed.tensor("packed"),
                packed.tensor("scales"),
                packed.tensor("zeros"),
                shape.out_features,
                shape.in_features,
                scheme.group_size,
            )
            scales, zeros = kept.get("given_scales", scales), kept.get("given_zeros", zeros)
        else:
            codes = (AtenInt4 if one else AtenInt4Experts).unpack(packed.tensor("packed"), scheme.bits)
            scales, zeros = kept["scales"], kept["zeros"]
        return QuantizedWeight(codes, scales, zeros, scheme), bias
