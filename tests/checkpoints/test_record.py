from __future__ import annotations

from pathlib import Path

import pytest
import torch

from awqc.checkpoints import SearchRecord, fingerprint, hash_tensor, hash_tokens
from awqc.checkpoints.record import read_record, write_record
from awqc.errors import CheckpointError

RECORD = SearchRecord(
    config={"bits": 4, "grid": 20},
    fingerprint="abc",
    ratios={"layer.0.norm": 0.55, "layer.0.v": None},
    scales={"layer.0.norm": torch.tensor([0.5, 2.0, 1.0])},
)


def test_a_record_comes_back(tmp_path: Path) -> None:
    write_record(tmp_path, RECORD)
    read = read_record(tmp_path)
    assert read is not None
    assert (read.config, read.fingerprint, read.ratios) == (RECORD.config, RECORD.fingerprint, RECORD.ratios)
    assert list(read.scales) == ["layer.0.norm"]
    assert torch.equal(read.scales["layer.0.norm"], RECORD.scales["layer.0.norm"])


def test_no_record(tmp_path: Path) -> None:
    assert read_record(tmp_path) is None


def test_a_record_of_another_version(tmp_path: Path) -> None:
    write_record(tmp_path, RECORD)
    file = tmp_path / "awqc.json"
    file.write_text(file.read_text().replace('"version": 1', '"version": 7'))
    with pytest.raises(CheckpointError) as caught:
        read_record(tmp_path)
    assert str(caught.value) == (
        f"{file} has version 7 and this awqc reads version 1: use the awqc that wrote it"
    )


def test_a_record_with_truncated_scales(tmp_path: Path) -> None:
    write_record(tmp_path, RECORD)
    file = tmp_path / "awqc.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="is truncated: its header promises 12 bytes"):
        read_record(tmp_path)


def test_the_fingerprint_depends_on_everything_and_on_no_order() -> None:
    tokens = hash_tokens([[1, 2], [3]])
    digests = {"a": hash_tensor(torch.ones(2)), "b": hash_tensor(torch.zeros(2))}
    whole = fingerprint({"bits": 4, "grid": 20}, tokens, digests)
    assert len(whole) == 64
    assert whole == fingerprint({"grid": 20, "bits": 4}, tokens, dict(reversed(digests.items())))
    others = {
        fingerprint({"bits": 3, "grid": 20}, tokens, digests),
        fingerprint({"bits": 4, "grid": 20}, hash_tokens([[1], [2, 3]]), digests),
        fingerprint({"bits": 4, "grid": 20}, tokens, {"a": digests["b"], "b": digests["a"]}),
    }
    assert len(others | {whole}) == 4


@pytest.mark.parametrize(
    "other",
    [
        torch.tensor([[1.0, 2.0, 3.0, 5.0]]),
        torch.tensor([1.0, 2.0, 3.0, 4.0]),
        torch.tensor([[1.0, 2.0, 3.0, 4.0]], dtype=torch.bfloat16),
    ],
)
def test_tensors_that_differ_in_value_shape_or_dtype_hash_differently(other: torch.Tensor) -> None:
    tensor = torch.tensor([[1.0, 2.0, 3.0, 4.0]])
    assert hash_tensor(tensor) != hash_tensor(other)
    assert hash_tensor(tensor) == hash_tensor(tensor.t().contiguous().t())
    assert len(hash_tensor(torch.tensor(1.0))) == 64
