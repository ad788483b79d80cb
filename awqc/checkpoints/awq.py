"""AutoAWQ checkpoints: ``gemm`` is written; gemm, gemv, gemv_fast (llm-awq) and marlin are read.

Written for the common ground of the engines: 4 bits, one group size for the whole model, float16 scales,
and always ``qzeros`` with ``zero_point: true``, symmetric groups having the zero point 8. Engines disagree
on what ``zero_point: false`` means for files that have, or lack, ``qzeros``; on these they agree.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from awqc.checkpoints.awq_layouts import LAYOUTS, pack_gemm
from awqc.checkpoints.format import CheckpointFormat, LinearReader, register_format
from awqc.checkpoints.tensors import TensorFiles
from awqc.errors import CheckpointError
from awqc.quantized import QuantizedWeight, Scheme

BITS = 4
MIDDLE = 8  # the zero point of symmetric groups


@register_format("awq")
class AwqFormat(CheckpointFormat):
    """``X.qweight`` ``(K, N / 8)`` and ``X.qzeros`` ``(G, N / 8)`` int32, ``X.scales`` ``(G, N)`` float16."""

    def refuses(self, out_features: int, in_features: int, scheme: Scheme) -> str | None:
        if scheme.bits != BITS:
            return f"its codes have {scheme.bits} bits and those of AWQ files have {BITS}"
        if out_features % 8:
            return f"its {out_features} output channels are not a multiple of the 8 in a word"
        if scheme.group_size != -1 and in_features % scheme.group_size:
            return f"its {in_features} input channels are not a multiple of group_size={scheme.group_size}"
        return None

    def encode(self, prefix: str, weight: QuantizedWeight) -> dict[str, Tensor]:
        return {
            f"{prefix}.qweight": pack_gemm(weight.codes),
            f"{prefix}.qzeros": pack_gemm(weight.zeros),
            f"{prefix}.scales": _half(prefix, weight.scales).mT.contiguous(),
        }

    def quantization_config(
        self, schemes: Mapping[str, Scheme], kept: Sequence[str] = (), head: str | None = None
    ) -> dict[str, Any]:
        sizes = Counter(scheme.group_size for scheme in schemes.values())
        if len(sizes) != 1:
            found = ", ".join(f"{size} (in {count} of them)" for size, count in sizes.items())
            raise CheckpointError(
                f"format 'awq' needs one group_size for all quantized linears, found {found}: compile with "
                "one group_size, or save as 'compressed-tensors' or 'awqc'"
            )
        if head in schemes:
            raise CheckpointError(
                f"format 'awq' cannot store the output head {head!r} quantized, since transformers would "
                "leave it with random weights: keep it in 16 bits, or save as 'compressed-tensors' or 'awqc'"
            )
        return {
            "quant_method": "awq",
            "bits": BITS,
            "group_size": next(iter(sizes)),
            "zero_point": True,
            "version": "gemm",
            "modules_to_not_convert": list(kept) or None,
        }

    def reader(self, config: Mapping[str, Any], files: TensorFiles) -> LinearReader:
        return AwqReader(config, files)


def _half(prefix: str, scales: Tensor) -> Tensor:
    half = scales.to(torch.float16)
    if not bool(half.isfinite().all()) or bool(((half == 0) & (scales != 0)).any()):
        raise CheckpointError(
            f"the scales of {prefix!r} reach from {scales.min().item():.3g} to {scales.max().item():.3g}, "
            "which float16 cannot hold and AWQ files need: save as 'compressed-tensors' or 'awqc'"
        )
    return half


class AwqReader(LinearReader):
    """Linears of an AWQ checkpoint of any layout.

    Which linears are quantized is read from the files: those with a ``qweight``. ``modules_to_not_convert``
    is matched differently by every engine and says nothing that the files do not.
    """

    def __init__(self, config: Mapping[str, Any], files: TensorFiles) -> None:
        super().__init__(files, ".qweight")
        bits = config.get("w_bit", config.get("bits", BITS))
        group_size = config.get("q_group_size", config.get("group_size", 128))
        version = config.get("version") or config.get("format") or config.get("checkpoint_format") or "gemm"
        if config.get("backend") == "llm-awq":
            version = "llm-awq"
        version = str(version).lower()
        if bits != BITS or not isinstance(group_size, int):
            raise CheckpointError(
                f"{files.directory} has bits={bits!r} and group_size={group_size!r} in its AWQ config: awqc "
                f"reads AWQ checkpoints with bits={BITS} and a whole number as group_size"
            )
        if version not in LAYOUTS:
            raise CheckpointError(
                f"{files.directory} has version={version!r} in its AWQ config: awqc reads "
                f"{', '.join(LAYOUTS)}"
            )
        self.layout = LAYOUTS[version]()
        self.scheme = Scheme(BITS, group_size, bool(config.get("zero_point", True)))
        self.settings = f"version={version!r} with bits={bits} and group_size={group_size}"

    def tensors(self, name: str) -> list[str]:
        parts = ("qweight", "scales", *self.layout.zeros)
        return [f"{name}.{part}" for part in parts if f"{name}.{part}" in self.files]

    def check(self, name: str) -> tuple[int, int]:
        n, k = self.layout.features(*self.matrix(f"{name}.qweight"))
        names = self._parts(name)
        for part, (expected, dtypes) in self.layout.parts(n, k, self.scheme.group(k)).items():
            if part in names:
                self.expect(names[part], expected, dtypes, self.settings)
        return n, k

    def weight(self, name: str) -> QuantizedWeight:
        _, k = self.check(name)
        tensors = {part: self.files.get(tensor) for part, tensor in self._parts(name).items()}
        try:
            codes, scales, zeros = self.layout.decode(tensors, self.scheme.groups(k))
        except CheckpointError as error:
            raise CheckpointError(f"{self.files.directory}, linear {name!r}: {error}") from error
        if zeros is None:
            zeros = torch.full(scales.shape, MIDDLE, dtype=torch.uint8)
        scheme = replace(self.scheme, zero_point=bool((zeros != MIDDLE).any()))
        return QuantizedWeight(codes, scales, zeros, scheme)

    def _parts(self, name: str) -> dict[str, str]:
        """Name on disk of each tensor of linear ``name`` that must be there."""
        parts = {"qweight": f"{name}.qweight", "scales": f"{name}.scales"}
        spellings = [f"{name}.{spelling}" for spelling in self.layout.zeros]
        stored = [tensor for tensor in spellings if tensor in self.files]
        if stored:
            parts["zeros"] = stored[0]
        elif spellings and self.scheme.zero_point:
            parts["zeros"] = spellings[0]  # its absence is an error, which check() reports
        return parts
