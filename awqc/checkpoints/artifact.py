"""awqc's own checkpoint: any width, any group size, mixed, nothing lost; lowers to every other format.

It is a checkpoint directory like the others, plus the record of the search that made it, so that another
backend or format needs no new search. No serving engine reads it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from awqc.checkpoints.format import CheckpointFormat, LinearReader, register_format
from awqc.checkpoints.packing import pack_bits, shapes, unpack_bits
from awqc.checkpoints.tensors import TensorFiles
from awqc.errors import CheckpointError
from awqc.quantized import QuantizedWeight, Scheme

VERSION = 1
SCALES = (torch.float16, torch.bfloat16, torch.float32)


@register_format("awqc")
class Artifact(CheckpointFormat):
    """``X.codes`` ``(N, ceil(K / 8) * bits)`` uint8 and ``X.zeros`` ``(N, ceil(G / 8) * bits)`` uint8, packed
    by :func:`~awqc.checkpoints.packing.pack_bits`; ``X.scales`` ``(N, G)``; ``X.shape`` ``[N, K]``;
    ``X.input_scale`` ``(K,)`` where the input is multiplied by it."""

    served = False
    input_scales = True

    def refuses(self, out_features: int, in_features: int, scheme: Scheme) -> str | None:
        return None

    def encode(self, prefix: str, weight: QuantizedWeight) -> dict[str, Tensor]:
        return {
            f"{prefix}.codes": pack_bits(weight.codes, weight.scheme.bits),
            f"{prefix}.scales": weight.scales.contiguous(),
            f"{prefix}.zeros": pack_bits(weight.zeros, weight.scheme.bits),
            f"{prefix}.shape": shapes(weight),
        }

    def quantization_config(
        self, schemes: Mapping[str, Scheme], kept: Sequence[str] = (), head: str | None = None
    ) -> dict[str, Any]:
        common = Counter(schemes.values()).most_common(1)[0][0]
        return {
            "quant_method": "awqc",
            "version": VERSION,
            "scheme": asdict(common),
            "exceptions": {name: asdict(scheme) for name, scheme in schemes.items() if scheme != common},
            "kept": list(kept),
        }

    def reader(self, config: Mapping[str, Any], files: TensorFiles) -> LinearReader:
        return ArtifactReader(config, files)


class ArtifactReader(LinearReader):
    """Linears of an awqc artifact; those with a ``codes``."""

    def __init__(self, config: Mapping[str, Any], files: TensorFiles) -> None:
        super().__init__(files, ".codes")
        version = config.get("version")
        if version != VERSION:
            raise CheckpointError(
                f"{files.directory} is an awqc artifact of version {version!r} and this awqc reads version "
                f"{VERSION}: use the awqc that wrote it"
            )
        try:
            self.common = Scheme(**config["scheme"])
            self.exceptions = {name: Scheme(**fields) for name, fields in config["exceptions"].items()}
        except (KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(
                f"{files.directory}: config.json does not say how the linears of this awqc artifact are "
                f"quantized ({error}): copy or save it again"
            ) from error

    def tensors(self, name: str) -> list[str]:
        return [f"{name}.{part}" for part in ("codes", "scales", "zeros", "shape")]

    def scheme(self, name: str) -> Scheme:
        """The scheme of linear ``name``."""
        return self.exceptions.get(name, self.common)

    def check(self, name: str) -> tuple[int, int]:
        scheme = self.scheme(name)
        settings = f"bits={scheme.bits} with group_size={scheme.group_size}"
        self.expect(f"{name}.shape", (2,), (torch.int64,), settings)
        n, k = self.files.get(f"{name}.shape").tolist()
        self.matrix(f"{name}.codes")
        self.expect(f"{name}.codes", (n, -(-k // 8) * scheme.bits), (torch.uint8,), settings)
        groups = scheme.groups(k)
        self.expect(f"{name}.scales", (n, groups), SCALES, settings)
        self.expect(f"{name}.zeros", (n, -(-groups // 8) * scheme.bits), (torch.uint8,), settings)
        return n, k

    def weight(self, name: str) -> QuantizedWeight:
        _, k = self.check(name)
        scheme = self.scheme(name)
        return QuantizedWeight(
            unpack_bits(self.files.get(f"{name}.codes"), scheme.bits, k),
            self.files.get(f"{name}.scales"),
            unpack_bits(self.files.get(f"{name}.zeros"), scheme.bits, scheme.groups(k)),
            scheme,
        )
