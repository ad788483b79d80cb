"""Tensors written as safetensors shards while they stream past."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from collections.abc import Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from awqc.checkpoints.tensors import INDEX_FILE, SINGLE_FILE
from awqc.errors import CheckpointError

MAX_SHARD_BYTES = 2_000_000_000


class DiskFull(OSError):
    """No space for a file of ``needed`` bytes."""

    def __init__(self, needed: int) -> None:
        super().__init__(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self.needed = needed


def write_json(file: Path, value: Mapping[str, Any]) -> None:
    """Write ``value`` as indented JSON, keys in the order given."""
    file.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def save_tensors(tensors: dict[str, Tensor], file: Path) -> None:
    """Write a safetensors file, readable by whom the umask allows: safetensors itself lets only the owner
    read what it writes."""
    file.touch()
    mode = file.stat().st_mode
    save_file(tensors, file, metadata={"format": "pt"})
    file.chmod(mode)


def write_sharded(
    directory: Path, tensors: Iterable[tuple[str, Tensor]], max_shard_bytes: int = MAX_SHARD_BYTES
) -> int:
    """Write named tensors as safetensors, holding no more than two shards in memory: one is written while the
    next is read.

    One shard becomes ``model.safetensors``; several are numbered and get an index.

    Args:
        directory: exists and holds no weights.
        tensors: names and tensors, on any device, in the order of the shards.
        max_shard_bytes: bytes of data in a shard; a larger tensor has a shard of its own.

    Returns:
        Bytes of tensor data written.

    Raises:
        CheckpointError: if a name comes twice.
        DiskFull: if a shard does not fit.
    """
    shards: list[list[str]] = []
    names: set[str] = set()
    shard: dict[str, Tensor] = {}
    addresses: set[int] = set()
    total = held = 0
    writing: Future[None] | None = None
    with ThreadPoolExecutor(1, thread_name_prefix="shards") as threads:
        for name, tensor in tensors:
            if name in names:
                raise CheckpointError(
                    f"tensor {name!r} would be written twice to {directory}: give each name once"
                )
            names.add(name)
            tensor = tensor.detach().cpu().contiguous()
            if shard and held + tensor.nbytes > max_shard_bytes:
                if writing is not None:
                    writing.result()
                writing = threads.submit(_write_shard, directory / _partial_name(len(shards)), shard, held)
                shards.append(list(shard))
                shard, addresses, held = {}, set(), 0
            # Tied tensors share memory, which the format cannot express: each name gets its own copy.
            shard[name] = tensor.clone() if tensor.data_ptr() in addresses else tensor
            addresses.add(tensor.data_ptr())
            held += tensor.nbytes
            total += tensor.nbytes
        if writing is not None:
            writing.result()
    _write_shard(directory / _partial_name(len(shards)), shard, held)
    shards.append(list(shard))
    _number_shards(directory, shards, total)
    return total


def _partial_name(index: int) -> str:
    return f"model-{index + 1:05d}.safetensors"


def _number_shards(directory: Path, shards: list[list[str]], total: int) -> None:
    if len(shards) == 1:
        (directory / _partial_name(0)).rename(directory / SINGLE_FILE)
        return
    weight_map = {}
    for index, names in enumerate(shards):
        file = f"model-{index + 1:05d}-of-{len(shards):05d}.safetensors"
        (directory / _partial_name(index)).rename(directory / file)
        weight_map.update(dict.fromkeys(names, file))
    write_json(directory / INDEX_FILE, {"metadata": {"total_size": total}, "weight_map": weight_map})


def _write_shard(file: Path, tensors: dict[str, Tensor], needed: int) -> None:
    # The library reports a full disk only as text, after it has tried; asking first costs nothing.
    if shutil.disk_usage(file.parent).free < needed:
        raise DiskFull(needed)
    try:
        save_tensors(tensors, file)
    except SafetensorError as error:
        if re.search(rf"os error {errno.ENOSPC}\b", str(error)):
            raise DiskFull(needed) from error
        raise CheckpointError(f"{file} cannot be written: {error}") from error
