"""Open a checkpoint directory, dense or quantized in any registered format."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from awqc.checkpoints.format import LinearReader, formats, get_format
from awqc.checkpoints.record import SearchRecord, read_record
from awqc.checkpoints.tensors import TensorFiles, read_json
from awqc.errors import CheckpointError
from awqc.quantized import QuantizedWeight

#: config.json's keys for the quantization: the second is compressed-tensors' older spelling.
_CONFIG_KEYS = ("quantization_config", "compression_config")


@dataclass(frozen=True)
class Checkpoint:
    """An open checkpoint; weights are read when asked for.

    Args:
        path: its directory.
        config: config.json.
        tensors: everything stored, under names on disk.
        format: name of its format, None for a dense checkpoint.
        linears: the reader of its quantized linears, None for a dense checkpoint.
    """

    path: Path
    config: dict[str, Any]
    tensors: TensorFiles
    format: str | None = None
    linears: LinearReader | None = None

    def quantized_names(self) -> list[str]:
        """Module names of the quantized linears."""
        return self.linears.names() if self.linears is not None else []

    def shape(self, name: str) -> tuple[int, int]:
        """``(N, K)`` of a quantized linear, without reading its weight.

        Raises:
            CheckpointError: if it is not quantized here, or its tensors disagree with the config.
        """
        return self._reader(name).check(name)

    def weight(self, name: str) -> QuantizedWeight:
        """Read the weight of a quantized linear; raises as :meth:`shape`."""
        return self._reader(name).weight(name)

    def dense_names(self) -> list[str]:
        """Names of the tensors that belong to no quantized weight."""
        if self.linears is None:
            return list(self.tensors)
        packed = {tensor for name in self.linears.names() for tensor in self.linears.tensors(name)}
        return [name for name in self.tensors if name not in packed]

    def dense(self, name: str) -> Tensor:
        """Read a tensor by its name on disk.

        Raises:
            CheckpointError: if there is none of this name.
        """
        return self.tensors.get(name)

    def record(self) -> SearchRecord | None:
        """The record of the search that made the checkpoint, where awqc left one.

        Raises:
            CheckpointError: if it is damaged.
        """
        return read_record(self.path)

    def _reader(self, name: str) -> LinearReader:
        if self.linears is None or name + self.linears.marker not in self.tensors:
            raise CheckpointError(
                f"{self.path}: linear {name!r} is not stored quantized: read it with dense()"
            )
        return self.linears


def open_checkpoint(path: Path | str) -> Checkpoint:
    """Open a checkpoint directory and check the headers of its quantized linears against its config.

    Raises:
        CheckpointError: if files are missing or damaged, the format is unknown, or tensors and config
            disagree.
    """
    path = Path(path)
    tensors = TensorFiles(path)
    config = read_json(path / "config.json")
    settings = _quantization_config(path, config)
    if settings is None:
        return Checkpoint(path, config, tensors)
    method = settings.get("quant_method")
    if method not in formats():
        raise CheckpointError(
            f"{path} is quantized with quant_method {method!r}: awqc reads {', '.join(formats())}"
        )
    linears = get_format(method).reader(settings, tensors)
    for name in linears.names():
        linears.check(name)
    return Checkpoint(path, config, tensors, method, linears)


def _quantization_config(path: Path, config: dict[str, Any]) -> dict[str, Any] | None:
    for key in _CONFIG_KEYS:
        settings = config.get(key)
        if isinstance(settings, dict):
            return settings
    # Early AWQ checkpoints describe themselves in a file of their own.
    if (path / "quant_config.json").is_file():
        return {"quant_method": "awq", **read_json(path / "quant_config.json")}
    if (path / "quantize_config.json").is_file():
        return read_json(path / "quantize_config.json")
    return None
