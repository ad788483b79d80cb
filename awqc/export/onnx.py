"""A model, compiled or float, as a directory that ONNX Runtime and onnxruntime-genai generate from."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import onnx_ir as ir
import torch
from torch import nn

from awqc import __version__
from awqc.checkpoints.atomic import atomic_directory
from awqc.errors import ConfigError, VerifyError
from awqc.export.check import check_file, largest_error, session
from awqc.export.decoder import Interface, interface
from awqc.export.genai import CONFIG_FILE, genai_config
from awqc.export.linears import Dequantize, Form, MatMulNBits
from awqc.export.lowering import lower
from awqc.export.program import trace
from awqc.storage.source import from_module, load_tokenizer

#: Name of the model within the directory.
MODEL_FILE = "model.onnx"
#: Version of the standard operators: the first that dequantizes blocks.
OPSET = 21
#: Bytes of weights above which they go to a file of their own: a protobuf message ends at 2 GiB.
EXTERNAL_ABOVE = 2_000_000_000

_LINEARS: Mapping[str, Any] = {"matmulnbits": MatMulNBits, "dequantize": Dequantize}
#: Relative rounding of an activation at each accuracy level of MatMulNBits: that of float16, which is the
#: largest error that float32 arithmetic is granted too, of bfloat16 and of int8.
_ROUNDING = {0: 2.0**-10, 1: 2.0**-10, 2: 2.0**-10, 3: 2.0**-7, 4: 2.0**-6}
_DTYPES = (torch.float32, torch.float16)


@dataclass(frozen=True)
class OnnxConfig:
    """How a model is written.

    Args:
        linears: ``"matmulnbits"`` writes quantized linears as ``com.microsoft.MatMulNBits``, which ONNX
            Runtime alone knows; ``"dequantize"`` as ``DequantizeLinear`` and ``MatMul`` of the standard,
            which run anywhere.
        accuracy_level: what MatMulNBits may round activations to: 0 leaves it to ONNX Runtime, 1 float32,
            2 float16, 3 bfloat16, 4 int8 (several times faster on CPUs).
        past: take and return keys and values, to generate with.

    Raises:
        ConfigError: if a field is out of range.
    """

    linears: Literal["matmulnbits", "dequantize"] = "matmulnbits"
    accuracy_level: int = 1
    past: bool = True

    def __post_init__(self) -> None:
        if self.linears not in _LINEARS:
            raise ConfigError(f"linears={self.linears!r}: choose one of {', '.join(_LINEARS)}")
        if self.accuracy_level not in _ROUNDING:
            raise ConfigError(f"accuracy_level={self.accuracy_level}: ONNX Runtime knows 0, 1, 2, 3 and 4")
        if self.linears == "dequantize" and self.accuracy_level != 1:
            raise ConfigError(
                f"accuracy_level={self.accuracy_level} is stored with MatMulNBits only: for dequantize it is "
                "an option of the session, session.qdq_matmulnbits_accuracy_level"
            )

    @property
    def form(self) -> Form:
        """What quantized linears become."""
        return Dequantize() if self.linears == "dequantize" else MatMulNBits(self.accuracy_level)


@dataclass(frozen=True)
class Exported:
    """What was written.

    Args:
        path: the directory.
        bytes: of the model, its weights included.
        forms: number of quantized linears by operator.
        error: relative error of the logits in ONNX Runtime against the model; None if not checked.
        notes: what a reader must know, one line each.
    """

    path: Path
    bytes: int
    forms: Mapping[str, int]
    error: float | None
    notes: tuple[str, ...]


def export_onnx(
    model: nn.Module,
    out: Path | str,
    config: OnnxConfig = OnnxConfig(),
    *,
    overwrite: bool = False,
    check: bool = True,
) -> Exported:
    """Write ``model`` as ONNX, with config and tokenizer beside it.

    Args:
        model: a causal language model of transformers, from :func:`awqc.load`, :func:`awqc.compile` or
            ``from_pretrained``, on the CPU, in float32 or float16.
        out: directory to write; it appears whole or not at all.
        config: how.
        overwrite: replace a model that is there.
        check: run ONNX's checker, and compare the logits of ONNX Runtime with those of ``model``.

    Raises:
        ConfigError: if the model is none that ONNX can hold.
        CaptureError: if it cannot be traced, or holds an op without an ONNX translation.
        CheckpointError: if the path cannot be written or the disk is full.
        VerifyError: if the result is not valid or computes something else.
    """
    dtype = _dtype(model)
    with atomic_directory(out, overwrite=overwrite) as directory:
        shape = interface(model, config.past)
        program = trace(model, shape, OPSET)
        lowered = lower(program, config.form, Dequantize())
        program.producer_name, program.producer_version = "awqc", __version__
        file = directory / MODEL_FILE
        size = _save(program, file)
        notes = [
            f"{name} is written as DequantizeLinear and MatMul: {why}"
            for name, why in lowered.refused.items()
        ]
        notes += _write_beside(model, shape, directory)
        error = _verify(file, model, shape, config, len(lowered.forms), dtype) if check else None
    return Exported(Path(out).resolve(), size, dict(Counter(lowered.forms.values())), error, tuple(notes))


def _dtype(model: nn.Module) -> torch.dtype:
    parameters = [p for p in model.parameters() if p.is_floating_point()]
    device = next((p.device for p in parameters if p.device.type != "cpu"), None)
    if device is not None:
        raise ConfigError(f"{type(model).__name__} is on {device}: move it to the CPU to export it")
    dtypes = [p.dtype for p in parameters]
    dtype = max(set(dtypes), key=dtypes.count)
    if dtype not in _DTYPES:
        raise ConfigError(
            f"{type(model).__name__} computes in {dtype}: ONNX Runtime needs float32, or float16 on a GPU"
        )
    return dtype


def _save(program: ir.Model, file: Path) -> int:
    """Write ``program``; returns its size in bytes."""
    weights = [value.const_value for value in program.graph.initializers.values()]
    size = sum(tensor.nbytes for tensor in weights if tensor is not None)
    data = f"{file.name}.data" if size > EXTERNAL_ABOVE else None
    ir.save(program, file, external_data=data)
    return sum(f.stat().st_size for f in file.parent.iterdir())


def _write_beside(model: nn.Module, shape: Interface, directory: Path) -> list[str]:
    """Config and tokenizer; returns notes about what is missing."""
    config: Any = model.config
    notes = []
    settings = json.loads(config.to_json_string(use_diff=False))
    settings.pop("quantization_config", None)  # describes the checkpoint
    (directory / "config.json").write_text(json.dumps(settings, indent=2))
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.save_pretrained(directory)  # type: ignore[operator,union-attr]
    genai = genai_config(model, shape, MODEL_FILE)
    if genai is None:
        notes.append(f"no {CONFIG_FILE}: onnxruntime-genai needs past keys and values of one shape")
    else:
        (directory / CONFIG_FILE).write_text(json.dumps(genai, indent=2))
    source = from_module(model).path
    try:
        if source is None:
            raise ConfigError("a model in memory carries no tokenizer")
        load_tokenizer(source).save_pretrained(directory)
    except ConfigError as error:
        notes.append(f"no tokenizer: {error}")
    return notes


def _verify(
    file: Path, model: nn.Module, shape: Interface, config: OnnxConfig, linears: int, dtype: torch.dtype
) -> float:
    check_file(file)
    error = largest_error(session(file), model, shape)
    bound = _ROUNDING[config.accuracy_level] * math.sqrt(max(linears, 1))
    if not error <= bound:
        raise VerifyError(
            f"logits of ONNX Runtime differ from the model's by {error:.1e}, where the rounding of "
            f"activations explains {bound:.1e}; nothing was written"
        )
    return error
