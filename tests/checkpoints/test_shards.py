from __future__ import annotations

import gc
import json
import os
import shutil
import weakref
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from awqc.checkpoints import TensorFiles
from awqc.checkpoints.shards import DiskFull, write_sharded
from awqc.errors import CheckpointError

KB = 1000


def tensors(count: int) -> Iterator[tuple[str, torch.Tensor]]:
    for i in range(count):
        yield f"t{i}", torch.full((KB,), i, dtype=torch.uint8)


def test_one_shard_is_one_plain_file(tmp_path: Path) -> None:
    assert write_sharded(tmp_path, tensors(3), 3 * KB) == 3 * KB
    assert [file.name for file in tmp_path.iterdir()] == ["model.safetensors"]
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_shards_are_numbered_and_indexed(tmp_path: Path) -> None:
    assert write_sharded(tmp_path, tensors(5), 2 * KB) == 5 * KB
    names = [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    assert sorted(file.name for file in tmp_path.iterdir()) == [*names, "model.safetensors.index.json"]
    assert json.loads((tmp_path / "model.safetensors.index.json").read_text()) == {
        "metadata": {"total_size": 5 * KB},
        "weight_map": {f"t{i}": names[i // 2] for i in range(5)},
    }
    assert list(load_file(tmp_path / names[1])) == ["t2", "t3"]
    files = TensorFiles(tmp_path)
    assert all(files.get(f"t{i}").tolist() == [i] * KB for i in range(5))


def test_a_tensor_larger_than_a_shard_has_its_own(tmp_path: Path) -> None:
    write_sharded(tmp_path, tensors(2), 10)
    assert len(list(tmp_path.glob("*.safetensors"))) == 2
    assert len(TensorFiles(tmp_path)) == 2


def test_no_more_than_two_shards_are_held(tmp_path: Path) -> None:
    memory: list[weakref.ref[np.ndarray]] = []
    most = 0

    def stream() -> Iterator[tuple[str, torch.Tensor]]:
        nonlocal most
        for i in range(12):
            array = np.zeros(KB, dtype=np.uint8)  # lives as long as a tensor that views it
            memory.append(weakref.ref(array))
            tensor = torch.from_numpy(array)
            del array
            gc.collect()
            most = max(most, sum(ref() is not None for ref in memory))
            yield f"t{i}", tensor

    write_sharded(tmp_path, stream(), 3 * KB)
    assert 3 < most <= 2 * 3 + 1  # one that is written, one that is full, and what does not fit into it


def test_tied_and_strided_tensors_are_written_in_full(tmp_path: Path) -> None:
    tied = torch.arange(6.0).view(2, 3)
    write_sharded(tmp_path, iter([("a", tied), ("b", tied), ("c", tied.t()), ("d", tied[:, 1])]))
    files = TensorFiles(tmp_path)
    assert torch.equal(files.get("a"), tied)
    assert torch.equal(files.get("b"), tied)
    assert torch.equal(files.get("c"), tied.t())
    assert torch.equal(files.get("d"), tied[:, 1])


def test_a_name_given_twice(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError) as caught:
        write_sharded(tmp_path, [("a", torch.zeros(1)), ("a", torch.ones(1))])
    assert str(caught.value) == f"tensor 'a' would be written twice to {tmp_path}: give each name once"


def test_no_space_is_noticed_before_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=2 * KB)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(DiskFull) as caught:
        write_sharded(tmp_path, tensors(3))
    assert caught.value.needed == 3 * KB


def test_a_full_disk_reported_by_the_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("awqc.checkpoints.shards.save_file", full)
    with pytest.raises(DiskFull):
        write_sharded(tmp_path, tensors(3))


def test_another_error_of_the_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise SafetensorError("I/O error: Input/output error (os error 5)")

    monkeypatch.setattr("awqc.checkpoints.shards.save_file", broken)
    with pytest.raises(CheckpointError) as caught:
        write_sharded(tmp_path, tensors(3))
    assert str(caught.value) == (
        f"{tmp_path / 'model-00001.safetensors'} cannot be written: I/O error: Input/output error (os "
        "error 5)"
    )


def test_a_shard_is_readable_by_whom_the_umask_allows(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        write_sharded(tmp_path, [("a", torch.zeros(2))])
    finally:
        os.umask(before)
    assert (tmp_path / "model.safetensors").stat().st_mode & 0o777 == 0o640
