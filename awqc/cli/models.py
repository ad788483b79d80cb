"""Models as commands get them: dense or quantized, by their directory."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

from awqc.checkpoints import open_checkpoint
from awqc.errors import ConfigError
from awqc.storage.loading import load
from awqc.storage.source import open_source

_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def quiet() -> None:
    """Leave stderr to awqc: no warnings and progress bars of transformers."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def check_device(name: str) -> torch.device:
    """The device called ``name``.

    Raises:
        ConfigError: if torch does not know it or this machine lacks it.
    """
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ConfigError(
            f"--device {name}: torch cannot use it here ({reason}): try --device cpu"
        ) from error
    return device


@dataclass(frozen=True)
class Division:
    """``--device-map`` and what belongs to it, as given."""

    device_map: str | None = None
    max_memory: str | None = None
    offload_folder: Path | None = None

    def arguments(self) -> dict[str, Any]:
        """As :func:`awqc.load` and ``from_pretrained`` take them; empty without a map.

        Raises:
            ConfigError: if a size cannot be read, or there is no map.
        """
        if self.device_map is None:
            if self.max_memory is not None or self.offload_folder is not None:
                raise ConfigError("--max-memory and --offload-folder divide a model: give --device-map too")
            return {}
        found: dict[str, Any] = {"device_map": self.device_map}
        if self.max_memory is not None:
            found["max_memory"] = dict(map(_size, self.max_memory.split(",")))
        if self.offload_folder is not None:
            found["offload_folder"] = self.offload_folder
        return found


def sizes(text: str | None) -> str | dict[int | str, int | str] | None:
    """A size, or the sizes of several places, as ``max_memory`` of :func:`awqc.compile_to`.

    Raises:
        ConfigError: if one cannot be read.
    """
    return text if text is None or "=" not in text else dict(map(_size, text.split(",")))


def _size(text: str) -> tuple[int | str, str]:
    place, equals, size = (part.strip() for part in text.partition("="))
    if not equals or not place or not size:
        raise ConfigError(f"--max-memory: {text!r} is no size of a place: write 0=10GB,cpu=30GB")
    return int(place) if place.isdigit() else place, size


def open_model(
    path: Path,
    backend: str = "auto",
    device: str = "cpu",
    dtype: str | None = None,
    division: Division | None = None,
) -> Any:
    """A causal language model that runs, read from a float or a quantized checkpoint.

    Raises:
        CheckpointError: if the directory is missing, damaged or disagrees with its config.
        BackendError: for an unknown backend.
        ConfigError: for an unknown dtype or a device that is not there.
    """
    quiet()
    place = check_device(device)
    if dtype is not None and dtype not in _DTYPES:
        raise ConfigError(f"--dtype {dtype}: choose one of {', '.join(_DTYPES)}")
    chosen = _DTYPES[dtype] if dtype is not None else None
    divided = (division or Division()).arguments()
    if path.is_dir() and open_checkpoint(path).format is not None:
        return load(path, backend, device=place, dtype=chosen, **divided)
    source = open_source(path)
    if divided:
        cls: Any = type(source.module)
        return cls.from_pretrained(path, dtype=chosen or source.dtype, **divided).eval()
    usual = torch.float32 if place.type == "cpu" else source.half
    return source.materialized().to(place, chosen or usual)
