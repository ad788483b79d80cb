"""What a compile is made from: a journal continues only the compile of the same things.

The weights are hashed by content while the first stages run: their files, or the tensors of a model in
memory. No stage counts as finished before that is known.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import platform
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from awqc import __version__
from awqc.checkpoints.record import hash_tensor
from awqc.config import QuantConfig
from awqc.pipeline import Pass, Pipeline
from awqc.storage.source import ModelSource, named_tensors

#: Files hashed at once.
_THREADS = 8


class Identity(dict[str, Any]):
    """What must be the same, as JSON values by what it is called."""

    @staticmethod
    def of(
        config: QuantConfig,
        pipeline: Pipeline,
        skipped: frozenset[str],
        calibration: str,
        root: str,
        device: torch.device,
    ) -> Identity:
        """Everything but the weights.

        Args:
            skipped: names of passes that are left out.
            calibration: SHA-256 of the calibration inputs.
            root: the submodule that is compiled.
        """
        where = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
        values = {
            "awqc": __version__,
            "torch": torch.__version__,
            "device": f"{device.type} ({where})",
            "calibration inputs": calibration,
            "root": root,
            **{f"option {name}": value for name, value in config.as_dict().items()},
            "passes": [_stated(p) for p in pipeline if p.name not in skipped and p.name != "lower"],
        }
        return Identity(json.loads(json.dumps(values, default=str)))

    def changes(self, before: Mapping[str, Any]) -> list[str]:
        """What is not as it was ``before``, one phrase each."""
        found = []
        for name in dict.fromkeys((*before, *self)):
            old, new = before.get(name), self.get(name)
            if old != new and isinstance(old, list) and isinstance(new, list):
                gone, added = [x for x in old if x not in new], [x for x in new if x not in old]
                parts = ([f"without {', '.join(gone)}"] if gone else []) + (
                    [f"with {', '.join(added)}"] if added else []
                )
                found.append(f"{name} ({' and '.join(parts) or 'in another order'})")
            elif old != new:
                found.append(f"{name} (was {_short(old)}, is {_short(new)})")
        return found


def _stated(current: Pass) -> str:
    """A pass with its options; of passes that do not come with awqc, with a hash of their code too."""
    stated = f"{current.name}: {current!r}"
    module = type(current).__module__
    if module.partition(".")[0] == "awqc":
        return stated
    try:
        code = inspect.getsource(type(current))
    except (OSError, TypeError):
        return f"{stated} of {module}"
    return f"{stated} of {module}, code {hashlib.sha256(code.encode()).hexdigest()[:16]}"


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 20 else f"{text[:16]}..."


class SourceDigest:
    """SHA-256 of a model's weights, computed in the background.

    Args:
        source: the model.
    """

    def __init__(self, source: ModelSource) -> None:
        on_disk = any(tensor.is_meta for _, tensor in named_tensors(source.module))
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="hash")
        self._found: dict[str, Future[str]] = {}
        if on_disk and source.path is not None:
            for file in _files(source.path):
                self._found[file.name] = self._threads.submit(_hash_file, file)
        else:
            whole = self._threads.submit(_hash_tensors, source)
            self._found["the model in memory"] = whole
        self._threads.shutdown(wait=False)

    def result(self) -> dict[str, str]:
        """The hashes by file; waits for them."""
        return {name: future.result() for name, future in self._found.items()}


def _files(directory: Path) -> Iterator[Path]:
    yield directory / "config.json"
    yield from sorted(directory.glob("*.safetensors"))


def _hash_file(file: Path) -> str:
    with file.open("rb") as stream:
        digest = hashlib.sha256()
        buffer = bytearray(1 << 24)
        view = memoryview(buffer)
        while count := stream.readinto(buffer):
            digest.update(view[:count])
    return digest.hexdigest()


def _hash_tensors(source: ModelSource) -> str:
    digest = hashlib.sha256()
    for name in source.names():
        digest.update(f"{name} {hash_tensor(source.read(name))}\n".encode())
    return digest.hexdigest()
