"""Backend ``cpu``: ATen's 4-bit kernel for decoding, a bfloat16 matmul for longer inputs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from awqc.backend import Backend, LinearShape, PackedLinear, register_backend
from awqc.errors import ConfigError
from awqc.kernels.qexperts_aten import AtenInt4Experts
from awqc.kernels.qlinear_aten import INT4_ROWS, AtenInt4
from awqc.quantized import QuantizedWeight


@register_backend("cpu")
@dataclass(frozen=True)
class CpuBackend(Backend):
    """Speed on CPUs, for codes of at most 4 bits.

    Args:
        prefill: what serves inputs of more than 8 rows (prompts, batches). The 4-bit kernel costs the same
            for every row, so that at 32 rows it takes 1.7 times a bfloat16 matmul and at 128 rows 2.5
            times. ``"dense"`` keeps a bfloat16 copy of the weight for them, at 2 bytes a weight on top of
            the half byte of the packed codes: never slower than a bfloat16 linear, and larger than one.
            ``"packed"`` keeps the packed codes alone: a quarter of the memory, slower on long inputs.

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
        return AtenInt4.legal(
            shape.out_features,
            shape.in_features,
            shape.scheme.bits,
            shape.scheme.group_size,
            shape.dtype,
            shape.device,
        )

    def pack(self, weight: QuantizedWeight, bias: Tensor | None, dtype: torch.dtype) -> PackedLinear:
        dense = self.prefill == "dense"
        scheme = weight.scheme
        kernel = AtenInt4 if weight.expert_count is None else AtenInt4Experts
        tensors, constants = kernel.pack(
            weight.codes, weight.scales, weight.zeros, bias, scheme.bits, scheme.group_size, dense=dense
        )
        notes = ["scales are rounded to bfloat16"]
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
        kernel = AtenInt4 if shape.expert_count is None else AtenInt4Experts
        codes = kernel.unpack(packed.tensor("packed"), shape.scheme.bits)
        scales, zeros = packed.kept["scales"], packed.kept["zeros"]
        return QuantizedWeight(codes, scales, zeros, shape.scheme), packed.tensors.get("bias")
