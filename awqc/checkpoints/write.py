"""Write a quantized model as a checkpoint directory that engines load."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from awqc.checkpoints.atomic import atomic_directory
from awqc.checkpoints.format import CheckpointFormat, check_format, get_format
from awqc.checkpoints.record import SearchRecord, write_record
from awqc.checkpoints.shards import MAX_SHARD_BYTES, write_json, write_sharded
from awqc.errors import CheckpointError
from awqc.quantized import QuantizedWeight, Scheme

_HALF = (torch.float16, torch.bfloat16)
#: config.json's spellings of the dtype: transformers 5 writes the first, transformers 4 the second.
_DTYPE_KEYS = ("dtype", "torch_dtype")
#: Everything beside the weights that a model directory needs; code and pickles match nothing here.
_COPIED = (
    "*.json",
    "*.txt",
    "*.model",
    "*.jinja",
    "*.tiktoken",
    "additional_chat_templates/*.jinja",
    "LICENSE*",
)
#: These describe weights that are not copied.
_LEFT_OUT = ("config.json", "quant_config.json", "quantize_config.json", "*.index.json", "awqc*.json")


@dataclass(frozen=True)
class QuantizedStream:
    """Quantized linears that are read one after the other.

    Args:
        shapes: ``(N, K)`` and scheme of every one by its module name on disk.
        weights: begins to read; each weight with its name, in any order, and a stack with the names of all
            that it holds.
    """

    shapes: Mapping[str, tuple[int, int, Scheme]]
    weights: Callable[[], Iterable[tuple[str | Sequence[str], QuantizedWeight]]]

    @staticmethod
    def of(quantized: Mapping[str, QuantizedWeight]) -> QuantizedStream:
        """Those of a mapping."""
        shapes = {n: (w.out_features, w.in_features, w.scheme) for n, w in quantized.items()}
        return QuantizedStream(shapes, quantized.items)


def write_checkpoint(
    out: Path | str,
    *,
    format: str,
    tensors: Iterable[tuple[str, Tensor]],
    quantized: Mapping[str, QuantizedWeight] | QuantizedStream,
    config: Mapping[str, Any],
    kept: Sequence[str] = (),
    head: str | None = None,
    dtype: torch.dtype | None = None,
    files_from: Path | str | None = None,
    record: SearchRecord | None = None,
    documents: Mapping[str, str] | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    overwrite: bool = False,
) -> Path:
    """Write a checkpoint; on failure, Ctrl-C included, what was at ``out`` is as it was.

    Args:
        out: the directory to write.
        format: name of a registered format.
        tensors: all tensors that are not quantized, biases of quantized linears among them, under their
            names on disk, with the dtypes in which they are to be stored.
        quantized: weight of every quantized linear by its module name on disk, or a stream of them.
        config: the source's config.json; kept as it is but for ``quantization_config`` and the dtype.
        kept: full module names of all linears that stay dense, in every spelling that engines use.
        head: module name of the linear that computes the logits.
        dtype: dtype that config.json states. By default the source's, or float16 where the source's is
            neither float16 nor bfloat16 and the format's engines know no other.
        files_from: model directory whose tokenizer, template, generation and processor files are copied.
        record: the search that made ``quantized``; for formats that no engine loads.
        documents: further text files by name, a report for example.
        max_shard_bytes: bytes of tensor data in a shard.
        overwrite: replace a checkpoint that is at ``out``.

    Returns:
        The absolute path of the checkpoint.

    Raises:
        CheckpointError: if the format cannot carry a linear, the path cannot be written, the disk is
            full, or a tensor comes twice.
    """
    fmt = get_format(format)
    if not isinstance(quantized, QuantizedStream):
        quantized = QuantizedStream.of(quantized)
    schemes = {name: scheme for name, (_, _, scheme) in quantized.shapes.items()}
    check_format(format, quantized.shapes, head)
    if record is not None and fmt.served:
        raise CheckpointError(
            f"a search record cannot go into format {format!r}, whose engines would take its tensors for "
            "weights: save it as 'awqc'"
        )
    settings = _with_dtype(config, fmt, dtype)
    settings["quantization_config"] = fmt.quantization_config(schemes, kept, head)
    with atomic_directory(out, overwrite=overwrite) as directory:
        if files_from is not None:
            _copy_files(Path(files_from), directory)
        for name, text in (documents or {}).items():
            (directory / name).write_text(text, encoding="utf-8")
        write_json(directory / "config.json", settings)
        if record is not None:
            write_record(directory, record)
        write_sharded(directory, _stored(fmt, tensors, quantized), max_shard_bytes)
    return Path(out).resolve()


def _stored(
    fmt: CheckpointFormat, tensors: Iterable[tuple[str, Tensor]], quantized: QuantizedStream
) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in tensors:
        module, _, parameter = name.rpartition(".")
        if parameter == "weight" and module in quantized.shapes:
            raise CheckpointError(
                f"{module!r} is quantized and its dense weight {name!r} was given too: leave it out"
            )
        yield name, tensor
    for names, weight in quantized.weights():
        if isinstance(names, str):
            yield from fmt.encode(names, weight).items()
            continue
        for first, stacked in fmt.encode(names[0], weight).items():
            # On the host they are cut apart: each is a copy of its own from a device.
            for name, tensor in zip(names, stacked.cpu(), strict=True):
                yield name + first.removeprefix(names[0]), tensor


def _with_dtype(
    config: Mapping[str, Any], fmt: CheckpointFormat, dtype: torch.dtype | None
) -> dict[str, Any]:
    """A copy of ``config`` that states ``dtype`` in the spelling it uses, in nested model configs too."""
    if dtype is not None and fmt.served and dtype not in _HALF:
        raise CheckpointError(
            f"dtype={dtype} in a checkpoint of format {fmt.name!r}: its engines compute in torch.float16 or "
            "torch.bfloat16 only"
        )
    copy = {key: dict(value) if isinstance(value, dict) else value for key, value in config.items()}
    parts = [copy, *(value for value in copy.values() if isinstance(value, dict))]
    stated = next((part[key] for part in parts for key in _DTYPE_KEYS if part.get(key)), None)
    if dtype is None and (not fmt.served or stated in ("float16", "bfloat16")):
        return copy
    name = str(dtype or torch.float16).removeprefix("torch.")
    if stated is None:
        copy["torch_dtype"] = name  # the spelling that all versions of transformers read
    for part in parts:
        for key in _DTYPE_KEYS:
            if key in part:
                part[key] = name
    return copy


def _copy_files(source: Path, directory: Path) -> None:
    for pattern in _COPIED:
        for file in sorted(source.glob(pattern)):
            if file.is_file() and not any(file.match(left_out) for left_out in _LEFT_OUT):
                copy = directory / file.relative_to(source)
                copy.parent.mkdir(exist_ok=True)
                shutil.copyfile(file, copy)
