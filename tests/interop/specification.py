"""Writes 4-bit checkpoints straight from the descriptions of the formats, one code at a time.

Nothing here is shared with ``awqc.checkpoints``: what the engines say about files written here says
whether the tests' harness and the reading of the formats are right, before awqc's writer is judged.

AutoAWQ ``gemm``: weights are stored transposed; a 32-bit word of ``qweight[k, c]`` holds the codes of output
channels ``8c .. 8c+7`` for input channel ``k``, the i-th four bits from the bottom being channel
``8c + ORDER[i]``; zero points likewise. compressed-tensors ``pack-quantized``: a word of
``weight_packed[n, c]`` holds the codes of input channels ``8c .. 8c+7`` in order; zero points are packed
along the output channels.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
FORMS = ("awq", "compressed-symmetric", "compressed-zero-point")


@dataclass(frozen=True)
class Codes:
    """A weight ``(N, K)`` as codes 0..15 ``(N, K)``, float16 scales ``(N, G)``, zero points ``(N, G)``."""

    codes: np.ndarray
    scales: np.ndarray
    zeros: np.ndarray

    def dense(self) -> np.ndarray:
        """The float32 weight ``(N, K)`` that the codes stand for."""
        group = self.codes.shape[1] // self.scales.shape[1]
        zeros, scales = (np.repeat(a.astype(np.float32), group, axis=1) for a in (self.zeros, self.scales))
        return (self.codes.astype(np.float32) - zeros) * scales


def round_to_nearest(weight: np.ndarray, group: int, symmetric: bool) -> Codes:
    """Codes of ``weight`` ``(N, K)`` from the minimum and maximum of every ``group`` input channels."""
    n, k = weight.shape
    grouped = weight.astype(np.float32).reshape(n, k // group, group)
    if symmetric:
        scales = (np.abs(grouped).max(-1) / 7.5).astype(np.float16)
        zeros = np.full(scales.shape, 8)
    else:
        low, high = np.minimum(grouped.min(-1), 0), np.maximum(grouped.max(-1), 0)
        scales = ((high - low) / 15).astype(np.float16)
        zeros = np.clip(np.rint(-low / scales.astype(np.float32)), 0, 15).astype(int)
    codes = np.rint(grouped / scales.astype(np.float32)[..., None]).astype(int) + zeros[..., None]
    return Codes(np.clip(codes, 0, 15).reshape(n, k), scales, zeros)


def word(nibbles: list[int]) -> int:
    """Eight codes as a signed 32-bit integer, the first in the lowest bits."""
    value = sum(nibble << 4 * i for i, nibble in enumerate(nibbles))
    return value - (1 << 32) if value >= 1 << 31 else value


def awq_words(matrix: np.ndarray) -> np.ndarray:
    """``(rows, N)`` codes as ``(rows, N / 8)`` words in AutoAWQ's order."""
    return np.array(
        [[word([int(row[8 * c + j]) for j in ORDER]) for c in range(len(row) // 8)] for row in matrix],
        dtype=np.int32,
    )


def ordered_words(matrix: np.ndarray) -> np.ndarray:
    """``(rows, K)`` codes as ``(rows, K / 8)`` words in their own order."""
    return np.array(
        [[word([int(row[8 * c + j]) for j in range(8)]) for c in range(len(row) // 8)] for row in matrix],
        dtype=np.int32,
    )


def awq_tensors(name: str, weight: Codes) -> dict[str, np.ndarray]:
    """What an AutoAWQ checkpoint holds for the linear ``name``."""
    return {
        f"{name}.qweight": awq_words(weight.codes.T),
        f"{name}.qzeros": awq_words(weight.zeros.T),
        f"{name}.scales": np.ascontiguousarray(weight.scales.T),
    }


def compressed_tensors(name: str, weight: Codes, symmetric: bool) -> dict[str, np.ndarray]:
    """What a ``pack-quantized`` checkpoint holds for the linear ``name``."""
    tensors = {
        f"{name}.weight_packed": ordered_words(weight.codes),
        f"{name}.weight_scale": weight.scales,
        f"{name}.weight_shape": np.array(weight.codes.shape, dtype=np.int64),
    }
    if not symmetric:
        tensors[f"{name}.weight_zero_point"] = np.ascontiguousarray(ordered_words(weight.zeros.T).T)
    return tensors


def awq_config(group: int) -> dict:
    """``quantization_config`` of an AutoAWQ checkpoint."""
    return {
        "quant_method": "awq",
        "bits": 4,
        "group_size": group,
        "zero_point": True,
        "version": "gemm",
        "modules_to_not_convert": None,
    }


def compressed_config(group: int, symmetric: bool) -> dict:
    """``quantization_config`` of a ``pack-quantized`` checkpoint."""
    weights = {
        "num_bits": 4,
        "type": "int",
        "symmetric": symmetric,
        "strategy": "group",
        "group_size": group,
        "dynamic": False,
        "actorder": None,
        "block_structure": None,
        "observer": "minmax",
        "observer_kwargs": {},
    }
    config = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "global_compression_ratio": None,
        "kv_cache_scheme": None,
        "ignore": ["lm_head"],
        "version": "0.20.0",
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "format": "pack-quantized",
                "input_activations": None,
                "output_activations": None,
                "weights": weights,
            }
        },
    }
    if not symmetric:
        # transformers cannot place packed zero points in a model; it can while it dequantizes.
        config["dequantize"] = True
    return config


def write(dense: Path, out: Path, form: str, group: int) -> Path:
    """Quantize every projection of the checkpoint ``dense`` into ``out`` and write the dense twin beside it.

    Args:
        dense: folder with ``config.json`` and one ``model.safetensors``.
        out: folder to make; the checkpoint is written there.
        form: one of ``FORMS``.
        group: input channels per scale.

    Returns:
        The folder of the twin: the dense model with every projection replaced by what its codes stand for.
    """
    symmetric = form == "compressed-symmetric"
    twin = out.with_name(out.name + "-twin")
    packed, unpacked = {}, {}
    for name, tensor in load_file(dense / "model.safetensors").items():
        module = name.removesuffix(".weight")
        if not module.endswith("_proj"):
            packed[name] = unpacked[name] = tensor
            continue
        codes = round_to_nearest(tensor, group, symmetric)
        unpacked[name] = codes.dense()
        tensors = (
            awq_tensors(module, codes) if form == "awq" else compressed_tensors(module, codes, symmetric)
        )
        packed.update(tensors)
    config = json.loads((dense / "config.json").read_text())
    quantization = awq_config(group) if form == "awq" else compressed_config(group, symmetric)
    for folder, tensors, block in (
        (out, packed, {"quantization_config": quantization, "dtype": "float16"}),
        (twin, unpacked, {}),
    ):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(json.dumps(config | block, indent=1))
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return twin
