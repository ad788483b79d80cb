"""Safetensors on disk, read lazily, one tensor at a time.

Pickle files are never opened: unpickling runs whatever code the file holds.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from awqc.errors import CheckpointError

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

_DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "U16": torch.uint16,
    "I16": torch.int16,
    "U32": torch.uint32,
    "I32": torch.int32,
    "U64": torch.uint64,
    "I64": torch.int64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "C64": torch.complex64,
}
#: Bytes of a tensor that one thread reads: a copy from the system's cache is bound by a core.
_PART = 1 << 25
#: Bytes of the largest tensor in page-locked memory, which is kept for others of its size.
LOCKED_MOST = 1 << 28
_READERS = ThreadPoolExecutor(4, thread_name_prefix="read")
_PAGE_LOCKED: ContextVar[bool] = ContextVar("_PAGE_LOCKED", default=False)
_LFS_POINTER = b"version https://git-lfs"
_AGAIN = "copy or download it again"


@dataclass(frozen=True)
class TensorInfo:
    """What a header says of one tensor; its data begin at byte ``begin`` of the file."""

    file: Path
    shape: tuple[int, ...]
    dtype: torch.dtype
    begin: int = 0

    @property
    def nbytes(self) -> int:
        """Bytes of its data."""
        return math.prod(self.shape) * self.dtype.itemsize


class TensorFiles:
    """The tensors of a checkpoint directory by name, each read from disk when it is asked for.

    Only headers are read at first. Iterating gives the names.

    Args:
        directory: holds ``model.safetensors``, or shards with ``model.safetensors.index.json``, or one
            safetensors file of any other name.

    Raises:
        CheckpointError: if a file is missing, truncated, corrupt, or lacks a tensor that the index
            promises; or if the directory holds pickled weights only.
    """

    def __init__(self, directory: Path | str) -> None:
        self.directory = Path(directory)
        self._info = _read_headers(self.directory)
        self._open: dict[Path, Any] = {}

    def get(self, name: str) -> Tensor:
        """Read one tensor. It may be a view of the mapped file: clone it before changing it in place.

        Raises:
            CheckpointError: if there is no such tensor, or its file cannot be read.
        """
        file = self.info(name).file
        try:
            if file not in self._open:
                self._open[file] = safe_open(file, framework="pt")
            tensor: Tensor = self._open[file].get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{file}: tensor {name!r} cannot be read ({error}): {_AGAIN}") from error
        return tensor

    def read(self, name: str) -> Tensor:
        """Read one tensor into memory of its own; raises as :meth:`get`."""
        return read_tensor(self.info(name))

    def info(self, name: str) -> TensorInfo:
        """File, shape and dtype of a tensor, from its header alone.

        Raises:
            CheckpointError: if there is no such tensor.
        """
        if name not in self._info:
            raise CheckpointError(
                f"{self.directory} has no tensor {name!r} among its {len(self)}: the checkpoint is "
                "incomplete or belongs to another model"
            )
        return self._info[name]

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, from its header alone; raises as :meth:`info`."""
        return self.info(name).shape

    def dtype(self, name: str) -> torch.dtype:
        """Dtype of a tensor, from its header alone; raises as :meth:`info`."""
        return self.info(name).dtype

    def __iter__(self) -> Iterator[str]:
        return iter(self._info)

    def __len__(self) -> int:
        return len(self._info)

    def __contains__(self, name: object) -> bool:
        return name in self._info


def _read_headers(directory: Path) -> dict[str, TensorInfo]:
    if not directory.is_dir():
        found = "is a file" if directory.exists() else "does not exist"
        raise CheckpointError(f"{directory} {found}: give the directory of a checkpoint")
    if (directory / SINGLE_FILE).is_file():
        return read_header(directory / SINGLE_FILE)
    if (directory / INDEX_FILE).is_file():
        return _read_indexed(directory)
    files = sorted(directory.glob("*.safetensors"))
    if len(files) == 1:
        return read_header(files[0])
    if files:
        raise CheckpointError(
            f"{directory} holds {len(files)} safetensors files ({files[0].name}, ...) but neither "
            f"{SINGLE_FILE} nor {INDEX_FILE}, so a missing shard could not be noticed: "
            "add the index that belongs to them"
        )
    pickles = sorted(file.name for end in ("bin", "pt", "pth") for file in directory.glob(f"*.{end}"))
    if pickles:
        raise CheckpointError(
            f"{directory} holds its weights as pickle files only ({pickles[0]}), and awqc never opens those, "
            "since unpickling runs any code they contain: if you trust them, convert them with transformers' "
            "from_pretrained(...) followed by save_pretrained(...), which writes safetensors"
        )
    raise CheckpointError(f"{directory} holds no weights: expected {SINGLE_FILE} or {INDEX_FILE}")


def _read_indexed(directory: Path) -> dict[str, TensorInfo]:
    index = directory / INDEX_FILE
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
        raise CheckpointError(f"{index} has no table 'weight_map' of tensor names to files: {_AGAIN}")
    headers: dict[str, dict[str, TensorInfo]] = {}
    for shard in sorted(set(weight_map.values())):
        if Path(shard).name != shard:
            raise CheckpointError(f"{index} points outside its directory, to {shard!r}: {_AGAIN}")
        if not (directory / shard).is_file():
            raise CheckpointError(f"{directory / shard} is missing, but {INDEX_FILE} lists it: {_AGAIN}")
        headers[shard] = read_header(directory / shard)
    info = {}
    for name, shard in weight_map.items():
        if name not in headers[shard]:
            raise CheckpointError(
                f"{directory / shard} has no tensor {name!r}, but {INDEX_FILE} says that it is there: "
                "copy or download both again"
            )
        info[name] = headers[shard][name]
    return info


def read_header(file: Path) -> dict[str, TensorInfo]:
    """Names, shapes and dtypes of the tensors in a safetensors file, without reading its data.

    Raises:
        CheckpointError: if the file is truncated, longer than its header says, or no safetensors file.
    """
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            prefix = stream.read(8)
            length = int.from_bytes(prefix, "little")
            text = prefix + stream.read(length) if length <= size - 8 else prefix + stream.read(64)
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error.strerror}") from error
    if text.startswith(_LFS_POINTER):
        raise CheckpointError(f"{file} is a Git LFS pointer, not the weights: run 'git lfs pull'")
    if len(prefix) < 8 or length > size - 8:
        promised = f"a header of {length:,} bytes" if len(prefix) == 8 else "a header"
        raise CheckpointError(
            f"{file} is truncated or no safetensors file: it should start with {promised} but holds "
            f"{size:,} bytes in all: {_AGAIN}"
        )
    try:
        header = json.loads(text[8:])
        header.pop("__metadata__", None)
        info = {name: _tensor_info(file, name, entry, 8 + length) for name, entry in header.items()}
        promised_bytes = max((entry["data_offsets"][1] for entry in header.values()), default=0)
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise CheckpointError(f"{file} is corrupt: its header cannot be read: {_AGAIN}") from error
    held = size - 8 - length
    if held != promised_bytes:
        fault = "is truncated" if held < promised_bytes else "is corrupt"
        raise CheckpointError(
            f"{file} {fault}: its header promises {promised_bytes:,} bytes of data but the file holds "
            f"{held:,}: {_AGAIN}"
        )
    return info


def read_tensor(info: TensorInfo) -> Tensor:
    """Read a tensor into memory of its own. Pages of a mapped file would count as the process's for as long
    as any tensor of the file is in use.

    Raises:
        CheckpointError: if its file cannot be read.
    """
    locked = _PAGE_LOCKED.get() and info.nbytes <= LOCKED_MOST
    tensor = torch.empty(info.shape, dtype=info.dtype, pin_memory=locked)
    if info.nbytes == 0:
        return tensor
    into = memoryview(tensor.view(-1).view(torch.uint8).numpy().data)

    def fill(start: int) -> None:
        with info.file.open("rb", buffering=0) as stream:
            stream.seek(info.begin + start)
            done, end = start, min(start + _PART, info.nbytes)
            while done < end:
                count = stream.readinto(into[done:end])
                if not count:
                    raise CheckpointError(f"{info.file} is truncated: {_AGAIN}")
                done += count

    try:
        starts = range(0, info.nbytes, _PART)
        for _ in map(fill, starts) if len(starts) == 1 else _READERS.map(fill, starts):
            pass
    except OSError as error:
        raise CheckpointError(f"{info.file} cannot be read: {error.strerror}") from error
    return tensor


@contextmanager
def page_locked(device: torch.device) -> Iterator[None]:
    """What the block reads, very large tensors apart, is copied to ``device`` without another copy."""
    token = _PAGE_LOCKED.set(device.type == "cuda")
    try:
        yield
    finally:
        _PAGE_LOCKED.reset(token)


def _tensor_info(file: Path, name: str, entry: Mapping[str, Any], data: int) -> TensorInfo:
    if entry["dtype"] not in _DTYPES:
        raise CheckpointError(
            f"{file}: tensor {name!r} has the dtype {entry['dtype']}, which awqc cannot read"
        )
    shape, dtype = tuple(entry["shape"]), _DTYPES[entry["dtype"]]
    begin, end = entry["data_offsets"]
    if end - begin != math.prod(shape) * dtype.itemsize:
        raise CheckpointError(
            f"{file} is corrupt: tensor {name!r} of shape {shape} and dtype {entry['dtype']} has "
            f"{end - begin:,} bytes: {_AGAIN}"
        )
    return TensorInfo(file, shape, dtype, data + begin)


def read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        CheckpointError: if the file is missing, is not JSON, or holds something else than an object.
    """
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise CheckpointError(f"{file} is not valid JSON ({error}): {_AGAIN}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{file} holds a {type(value).__name__}, not a JSON object: {_AGAIN}")
    return value
