"""One entry of a journal: a safetensors file, and beside it a record that makes it count.

The record is written last and holds the SHA-256 of the tensors' file and of itself: an entry is there
whole, or it is not there. Both files are flushed to the disk before they get their names.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor

from awqc.checkpoints.atomic import FULL, flush
from awqc.checkpoints.tensors import TensorInfo, read_header
from awqc.errors import CheckpointError, JournalError

#: Bytes that are hashed at a time.
_CHUNK = 1 << 24


@dataclass(frozen=True)
class Entry:
    """What one stage has left.

    Args:
        record: JSON values.
        tensors: where each of its tensors is.
    """

    record: Mapping[str, Any]
    tensors: Mapping[str, TensorInfo]


def write_entry(
    directory: Path, number: int, record: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> Entry:
    """Write entry ``number``; when this returns it survives a loss of power.

    Args:
        tensors: on the CPU.

    Raises:
        JournalError: if the disk is full.
    """
    data = safetensors.torch.save(dict(tensors))
    write_whole(directory / f"{_name(number)}.safetensors", data)
    body = {"tensors": hashlib.sha256(data).hexdigest(), "record": dict(record)}
    write_sealed(directory / f"{_name(number)}.json", body)
    flush(directory)
    return Entry(record, read_header(directory / f"{_name(number)}.safetensors"))


def read_entry(directory: Path, number: int) -> Entry | None:
    """Entry ``number``, checked; None if there is none.

    Raises:
        JournalError: if it is damaged; the message names the file.
    """
    file = directory / f"{_name(number)}.json"
    if not file.is_file():
        return None
    body = read_sealed(file)
    tensors = file.with_suffix(".safetensors")
    try:
        with tensors.open("rb") as stream:
            digest = hashlib.sha256()
            while chunk := stream.read(_CHUNK):
                digest.update(chunk)
        if digest.hexdigest() != body["tensors"]:
            raise JournalError(f"{tensors} has another checksum than {file.name} states")
        return Entry(body["record"], read_header(tensors))
    except (OSError, CheckpointError, KeyError) as error:
        raise JournalError(f"{tensors} cannot be read ({error})") from error


def drop_entries(directory: Path, first: int) -> None:
    """Remove entry ``first`` and all that follow it."""
    for file in directory.glob(f"{_PREFIX}*.*"):
        digits = file.name.removeprefix(_PREFIX).partition(".")[0]
        if digits.isdigit() and int(digits) >= first:
            file.unlink()
    flush(directory)


_PREFIX = "stage-"


def _name(number: int) -> str:
    return f"{_PREFIX}{number:05d}"


def write_sealed(file: Path, body: Mapping[str, Any]) -> None:
    """Write JSON values with a checksum of theirs; raises as :func:`write_whole`."""
    text = json.dumps(body, sort_keys=True)
    sealed = {"sha256": hashlib.sha256(text.encode()).hexdigest(), **body}
    write_whole(file, json.dumps(sealed, sort_keys=True, indent=1).encode())


def read_sealed(file: Path) -> dict[str, Any]:
    """What :func:`write_sealed` wrote.

    Raises:
        JournalError: if it is not what was written.
    """
    try:
        body = json.loads(file.read_text(encoding="utf-8"))
        stated = body.pop("sha256")
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise JournalError(f"{file} cannot be read ({error})") from error
    if hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest() != stated:
        raise JournalError(f"{file} has another checksum than it states")
    return dict(body)


def write_whole(file: Path, data: bytes) -> None:
    """Write a file that is there whole or not at all, and flush it.

    Raises:
        JournalError: if the disk is full.
    """
    partial = file.with_name(f".{file.name}.partial")
    try:
        with partial.open("wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        partial.replace(file)
    except OSError as error:
        partial.unlink(missing_ok=True)
        if error.errno not in FULL:
            raise
        free = shutil.disk_usage(file.parent).free
        raise JournalError(
            f"the disk is full: {file} needs {len(data):,} bytes and {free:,} are free. Finished stages are "
            f"kept in {file.parent}: free some space and run the same command again"
        ) from error
