"""What a search decided and from what, kept beside its result."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from awqc.checkpoints.shards import save_tensors, write_json
from awqc.checkpoints.tensors import read_header, read_json
from awqc.errors import CheckpointError

RECORD_FILE = "awqc.json"
SCALES_FILE = "awqc.safetensors"
VERSION = 1


@dataclass(frozen=True)
class SearchRecord:
    """The outcome of a search by scale group.

    Args:
        config: the options of the search, as JSON values.
        fingerprint: of options, calibration tokens and source weights; see :func:`fingerprint`.
        ratios: chosen exponent of each scale group; None where the group keeps its scales.
        scales: the vector ``s`` ``(C,)`` folded into each scale group that has one.
    """

    config: Mapping[str, Any]
    fingerprint: str
    ratios: Mapping[str, float | None] = field(default_factory=dict)
    scales: Mapping[str, Tensor] = field(default_factory=dict)


def fingerprint(config: Mapping[str, Any], tokens: str, weights: Mapping[str, str]) -> str:
    """SHA-256 over everything that determines a search.

    Args:
        config: the options of the search, as JSON values.
        tokens: :func:`hash_tokens` of the calibration tokens.
        weights: :func:`hash_tensor` of every source tensor by name.
    """
    content = json.dumps([config, tokens, weights], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()


def hash_tokens(sequences: Iterable[Sequence[int]]) -> str:
    """SHA-256 of calibration sequences, given as token ids, in their order."""
    digest = hashlib.sha256()
    for sequence in sequences:
        digest.update((",".join(map(str, sequence)) + ";").encode())
    return digest.hexdigest()


def hash_tensor(tensor: Tensor) -> str:
    """SHA-256 of a tensor's dtype, shape and bytes."""
    digest = hashlib.sha256(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
    flat = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
    digest.update(flat.numpy().data)
    return digest.hexdigest()


def write_record(directory: Path, record: SearchRecord) -> None:
    """Write ``record`` into a checkpoint directory."""
    content = {
        "version": VERSION,
        "fingerprint": record.fingerprint,
        "config": dict(record.config),
        "ratios": dict(record.ratios),
    }
    write_json(directory / RECORD_FILE, content)
    scales = {name: scale.detach().cpu().clone().contiguous() for name, scale in record.scales.items()}
    save_tensors(scales, directory / SCALES_FILE)


def read_record(directory: Path) -> SearchRecord | None:
    """The record in a checkpoint directory, None if there is none.

    Raises:
        CheckpointError: if it is damaged or of an unknown version.
    """
    file = directory / RECORD_FILE
    if not file.is_file():
        return None
    content = read_json(file)
    if content.get("version") != VERSION:
        raise CheckpointError(
            f"{file} has version {content.get('version')!r} and this awqc reads version {VERSION}: use the "
            "awqc that wrote it"
        )
    read_header(directory / SCALES_FILE)  # tells what is wrong with a damaged file
    return SearchRecord(
        content.get("config", {}),
        content.get("fingerprint", ""),
        content.get("ratios", {}),
        load_file(directory / SCALES_FILE),
    )
