"""compressed-tensors checkpoints in the ``pack-quantized`` format, 4 and 8 bits, weights only."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from awqc.checkpoints.format import CheckpointFormat, LinearReader, register_format
from awqc.checkpoints.packing import pack_words, shapes, unpack_words
from awqc.checkpoints.tensors import TensorFiles
from awqc.errors import CheckpointError
from awqc.quantized import QuantizedWeight, Scheme

PACKED = "pack-quantized"
BITS = (4, 8)
SCALES = (torch.float16, torch.bfloat16, torch.float32)
INTEGERS = (torch.int64, torch.int32)


@register_format("compressed-tensors")
class CompressedTensors(CheckpointFormat):
    """``X.weight_packed`` ``(N, K * bits / 32)`` int32, ``X.weight_scale`` ``(N, G)``, ``X.weight_shape``
    ``[N, K]`` and, for asymmetric groups, ``X.weight_zero_point`` ``(N * bits / 32, G)`` int32.

    The format speaks of signed codes stored with an offset of ``2 ** (bits - 1)``: the canonical unsigned
    codes and zero points are what is stored.
    """

    def refuses(self, out_features: int, in_features: int, scheme: Scheme) -> str | None:
        if scheme.bits not in BITS:
            return f"its codes have {scheme.bits} bits and those of packed compressed-tensors have 4 or 8"
        per_word = 32 // scheme.bits
        if in_features % per_word:
            return f"its {in_features} input channels are not a multiple of the {per_word} in a word"
        if scheme.zero_point and out_features % per_word:
            return f"its zero points for {out_features} output channels do not fill words of {per_word}"
        if scheme.group_size != -1 and in_features % scheme.group_size:
            return f"its {in_features} input channels are not a multiple of group_size={scheme.group_size}"
        return None

    def encode(self, prefix: str, weight: QuantizedWeight) -> dict[str, Tensor]:
        bits = weight.scheme.bits
        tensors = {
            f"{prefix}.weight_packed": pack_words(weight.codes, bits),
            f"{prefix}.weight_scale": weight.scales.contiguous(),
            f"{prefix}.weight_shape": shapes(weight),
        }
        if weight.scheme.zero_point:
            words = pack_words(weight.zeros.mT, bits)
            tensors[f"{prefix}.weight_zero_point"] = words.mT.contiguous()
        return tensors

    def quantization_config(
        self, schemes: Mapping[str, Scheme], kept: Sequence[str] = (), head: str | None = None
    ) -> dict[str, Any]:
        members: dict[Scheme, list[str]] = {}
        for name, scheme in schemes.items():
            members.setdefault(scheme, []).append(name)
        if len(members) == 1:
            # The output head is no Linear to every engine and has to be named.
            targets = [["Linear"] if head is None or head not in schemes else ["Linear", head]]
        else:
            targets = [*members.values()]
        config: dict[str, Any] = {
            "quant_method": "compressed-tensors",
            "format": PACKED,
            "quantization_status": "compressed",
            "global_compression_ratio": None,
            "kv_cache_scheme": None,
            "ignore": list(kept),
            "config_groups": {
                f"group_{i}": _config_group(scheme, names)
                for i, (scheme, names) in enumerate(zip(members, targets, strict=True))
            },
            "version": "0.20.0",
        }
        if len(members) == 1 and next(iter(members)).zero_point:
            # transformers 5 cannot keep asymmetric weights packed; other engines do not read this key. Given
            # several groups it would take the first one's scheme for all: without the key it fails instead.
            config["dequantize"] = True
        return config

    def reader(self, config: Mapping[str, Any], files: TensorFiles) -> LinearReader:
        return CompressedTensorsReader(config, files)


def _config_group(scheme: Scheme, targets: list[str]) -> dict[str, Any]:
    whole_rows = scheme.group_size == -1
    return {
        "targets": targets,
        "format": PACKED,
        "input_activations": None,
        "output_activations": None,
        "weights": {
            "num_bits": scheme.bits,
            "type": "int",
            "symmetric": not scheme.zero_point,
            "strategy": "channel" if whole_rows else "group",
            "group_size": None if whole_rows else scheme.group_size,
            "dynamic": False,
            "actorder": None,
            "block_structure": None,
            "observer": "minmax",
            "observer_kwargs": {},
        },
    }


class CompressedTensorsReader(LinearReader):
    """Linears of a compressed-tensors checkpoint; those with a ``weight_packed``."""

    def __init__(self, config: Mapping[str, Any], files: TensorFiles) -> None:
        super().__init__(files, ".weight_packed")
        self.groups = [
            (list(group.get("targets", ())), _scheme(group, config.get("format"), files))
            for group in config.get("config_groups", {}).values()
        ]

    def tensors(self, name: str) -> list[str]:
        parts = ("weight_packed", "weight_scale", "weight_shape", "weight_zero_point")
        return [f"{name}.{part}" for part in parts if f"{name}.{part}" in self.files]

    def scheme(self, name: str) -> Scheme:
        """The scheme that the config gives linear ``name``: by its name first, then by a pattern, then
        by its class.

        Raises:
            CheckpointError: if no group targets it.
        """
        for targets, scheme in self.groups:
            if name in targets:
                return scheme
        for targets, scheme in self.groups:
            if any(target.startswith("re:") and re.match(target[3:], name) for target in targets):
                return scheme
        for targets, scheme in self.groups:
            if "Linear" in targets:
                return scheme
        raise CheckpointError(
            f"{self.files.directory}: linear {name!r} is stored packed, but no group of config_groups in "
            "config.json targets it: weights and config do not belong together; restore the config.json that "
            "was saved with these weights"
        )

    def check(self, name: str) -> tuple[int, int]:
        scheme = self.scheme(name)
        settings = f"num_bits={scheme.bits} with group_size={scheme.group_size}"
        per_word = 32 // scheme.bits
        n, words = self.matrix(f"{name}.weight_packed")
        k = words * per_word
        if f"{name}.weight_shape" in self.files:
            self.expect(f"{name}.weight_shape", (2,), INTEGERS, settings)
            n, k = self.files.get(f"{name}.weight_shape").tolist()
        self.expect(f"{name}.weight_packed", (n, math.ceil(k / per_word)), (torch.int32,), settings)
        groups = scheme.groups(k)
        self.expect(f"{name}.weight_scale", (n, groups), SCALES, settings)
        if scheme.zero_point:
            zeros = (math.ceil(n / per_word), groups)
            self.expect(f"{name}.weight_zero_point", zeros, (torch.int32,), settings)
        if f"{name}.weight_g_idx" in self.files:
            raise CheckpointError(
                f"{self.files.directory}: linear {name!r} has its input channels reordered (weight_g_idx), "
                "which awqc cannot read: save it without activation ordering"
            )
        return n, k

    def weight(self, name: str) -> QuantizedWeight:
        n, k = self.check(name)
        scheme = self.scheme(name)
        scales = self.files.get(f"{name}.weight_scale")
        codes = unpack_words(self.files.get(f"{name}.weight_packed"), scheme.bits)[:, :k].contiguous()
        if scheme.zero_point:
            words = self.files.get(f"{name}.weight_zero_point").t()
            zeros = unpack_words(words, scheme.bits)[:, :n].t().contiguous()
        else:
            zeros = torch.full(scales.shape, scheme.levels // 2, dtype=torch.uint8)
        return QuantizedWeight(codes, scales, zeros, scheme)


def _scheme(group: Mapping[str, Any], format_of_all: str | None, files: TensorFiles) -> Scheme:
    weights = group.get("weights") or {}
    stored = group.get("format") or format_of_all
    unreadable = None
    if stored != PACKED:
        unreadable = f"format {stored!r}"
    elif group.get("input_activations") is not None:
        unreadable = "quantized activations"
    elif weights.get("type", "int") != "int" or weights.get("num_bits") not in BITS:
        unreadable = f"weights of {weights.get('num_bits')} bits and type {weights.get('type')!r}"
    elif weights.get("strategy") not in ("group", "channel"):
        unreadable = f"strategy {weights.get('strategy')!r}"
    if unreadable is not None:
        raise CheckpointError(
            f"{files.directory} is a compressed-tensors checkpoint with {unreadable}: awqc reads {PACKED!r} "
            "with integer weights of 4 or 8 bits, by group or channel"
        )
    group_size = weights["group_size"] if weights["strategy"] == "group" else -1
    return Scheme(weights["num_bits"], group_size, not weights.get("symmetric", True))
