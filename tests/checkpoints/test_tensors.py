from __future__ import annotations

import contextlib
import json
import re
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save, save_file

from awqc.checkpoints import TensorFiles
from awqc.checkpoints.tensors import SINGLE_FILE, read_header
from awqc.errors import CheckpointError

TENSORS = {
    "a.weight": torch.arange(6, dtype=torch.float32).view(2, 3),
    "b.bias": torch.ones(4, dtype=torch.bfloat16),
    "c.qweight": torch.tensor([[-1, 7]], dtype=torch.int32),
    "d": torch.tensor(3, dtype=torch.int64),
}


def sharded(directory: Path) -> Path:
    """Two shards with an index, tensors in turn."""
    weight_map = {}
    for i in range(2):
        file = f"model-0000{i + 1}-of-00002.safetensors"
        part = dict(list(TENSORS.items())[i::2])
        save_file(part, directory / file)
        weight_map.update(dict.fromkeys(part, file))
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return directory


def message(directory: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        TensorFiles(directory)
    return str(caught.value)


@pytest.mark.parametrize("name", ["model.safetensors", "anything.safetensors", "shards"])
def test_every_tensor_is_found_with_its_header(tmp_path: Path, name: str) -> None:
    if name == "shards":
        sharded(tmp_path)
    else:
        save_file(TENSORS, tmp_path / name)
    files = TensorFiles(tmp_path)
    assert sorted(files) == sorted(TENSORS)
    assert len(files) == 4
    assert "a.weight" in files
    assert "x" not in files
    for tensor_name, tensor in TENSORS.items():
        assert files.shape(tensor_name) == tuple(tensor.shape)
        assert files.dtype(tensor_name) == tensor.dtype
        assert torch.equal(files.get(tensor_name), tensor)


def test_a_large_tensor_is_read_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("awqc.checkpoints.tensors._PART", 1000)
    value = torch.randn(37, 53, generator=torch.Generator().manual_seed(0))
    save_file({"first": torch.zeros(3), "large": value}, tmp_path / SINGLE_FILE)
    files = TensorFiles(tmp_path)
    assert torch.equal(files.read("large"), value)
    with (tmp_path / SINGLE_FILE).open("r+b") as stream:
        stream.truncate(stream.seek(0, 2) - 1500)  # after the header was read
    with pytest.raises(CheckpointError, match="is truncated"):
        files.read("large")


def test_headers_alone_are_read_at_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sharded(tmp_path)
    opened = []
    monkeypatch.setattr("awqc.checkpoints.tensors.safe_open", lambda file, framework: opened.append(file))
    files = TensorFiles(tmp_path)
    assert files.shape("a.weight") == (2, 3)
    assert opened == []


def test_model_safetensors_goes_before_an_index(tmp_path: Path) -> None:
    sharded(tmp_path)
    save_file({"only": torch.zeros(1)}, tmp_path / "model.safetensors")
    assert list(TensorFiles(tmp_path)) == ["only"]


def test_truncated_shard(tmp_path: Path) -> None:
    file = sharded(tmp_path) / "model-00002-of-00002.safetensors"
    file.write_bytes(file.read_bytes()[:-5])
    assert message(tmp_path) == (
        f"{file} is truncated: its header promises 16 bytes of data but the file holds 11: "
        "copy or download it again"
    )


def test_data_after_the_last_tensor(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(save(TENSORS) + b"1234")
    assert message(tmp_path) == (
        f"{file} is corrupt: its header promises 48 bytes of data but the file holds 52: "
        "copy or download it again"
    )


def test_truncated_within_the_header(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    whole = save(TENSORS)
    file.write_bytes(whole[:20])
    assert message(tmp_path) == (
        f"{file} is truncated or no safetensors file: it should start with a header of "
        f"{int.from_bytes(whole[:8], 'little')} bytes but holds 20 bytes in all: copy or download it again"
    )


def test_empty_file(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"")
    assert message(tmp_path) == (
        f"{file} is truncated or no safetensors file: it should start with a header but holds 0 bytes in "
        "all: copy or download it again"
    )


def test_header_that_is_no_json(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes((8).to_bytes(8, "little") + b"{[[[}]]]")
    assert message(tmp_path) == f"{file} is corrupt: its header cannot be read: copy or download it again"


def test_tensor_whose_bytes_do_not_fit_its_shape(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    header = b'{"a":{"dtype":"F32","shape":[3],"data_offsets":[0,8]}}'
    file.write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    assert message(tmp_path) == (
        f"{file} is corrupt: tensor 'a' of shape (3,) and dtype F32 has 8 bytes: copy or download it again"
    )


def test_unknown_dtype(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    header = b'{"a":{"dtype":"F6","shape":[4],"data_offsets":[0,3]}}'
    file.write_bytes(len(header).to_bytes(8, "little") + header + bytes(3))
    assert message(tmp_path) == f"{file}: tensor 'a' has the dtype F6, which awqc cannot read"


def test_git_lfs_pointer(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    assert message(tmp_path) == f"{file} is a Git LFS pointer, not the weights: run 'git lfs pull'"


def test_missing_shard(tmp_path: Path) -> None:
    file = sharded(tmp_path) / "model-00001-of-00002.safetensors"
    file.unlink()
    assert message(tmp_path) == (
        f"{file} is missing, but model.safetensors.index.json lists it: copy or download it again"
    )


def test_index_that_names_a_tensor_its_shard_lacks(tmp_path: Path) -> None:
    file = sharded(tmp_path) / "model-00001-of-00002.safetensors"
    save_file({"other": torch.zeros(1)}, file)
    assert message(tmp_path) == (
        f"{file} has no tensor 'a.weight', but model.safetensors.index.json says that it is there: "
        "copy or download both again"
    )


def test_index_that_points_outside(tmp_path: Path) -> None:
    index = tmp_path / "model.safetensors.index.json"
    index.write_text('{"weight_map": {"a": "../secret.safetensors"}}')
    assert message(tmp_path) == (
        f"{index} points outside its directory, to '../secret.safetensors': copy or download it again"
    )


@pytest.mark.parametrize("text", ["{}", '{"weight_map": []}', '{"weight_map": {"a": 1}}'])
def test_index_without_a_weight_map(tmp_path: Path, text: str) -> None:
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(text)
    assert message(tmp_path) == (
        f"{index} has no table 'weight_map' of tensor names to files: copy or download it again"
    )


def test_index_that_is_no_json(tmp_path: Path) -> None:
    index = tmp_path / "model.safetensors.index.json"
    index.write_text("{")
    assert message(tmp_path).startswith(f"{index} is not valid JSON (")
    index.write_text("[]")
    assert message(tmp_path) == f"{index} holds a list, not a JSON object: copy or download it again"


def test_pickles_are_never_opened(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"not even a pickle")
    assert message(tmp_path) == (
        f"{tmp_path} holds its weights as pickle files only (pytorch_model.bin), and awqc never opens those, "
        "since unpickling runs any code they contain: if you trust them, convert them with transformers' "
        "from_pretrained(...) followed by save_pretrained(...), which writes safetensors"
    )


def test_no_weights(tmp_path: Path) -> None:
    assert message(tmp_path) == (
        f"{tmp_path} holds no weights: expected model.safetensors or model.safetensors.index.json"
    )


def test_shards_without_an_index(tmp_path: Path) -> None:
    (sharded(tmp_path) / "model.safetensors.index.json").unlink()
    assert message(tmp_path) == (
        f"{tmp_path} holds 2 safetensors files (model-00001-of-00002.safetensors, ...) but neither "
        "model.safetensors nor model.safetensors.index.json, so a missing shard could not be noticed: "
        "add the index that belongs to them"
    )


def test_no_directory(tmp_path: Path) -> None:
    assert message(tmp_path / "x") == f"{tmp_path / 'x'} does not exist: give the directory of a checkpoint"
    (tmp_path / "y").write_text("")
    assert message(tmp_path / "y") == f"{tmp_path / 'y'} is a file: give the directory of a checkpoint"


def test_unknown_tensor(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "model.safetensors")
    expected = (
        f"{tmp_path} has no tensor 'x' among its 4: the checkpoint is incomplete or belongs to another model"
    )
    for ask in (TensorFiles.get, TensorFiles.shape, TensorFiles.dtype):
        with pytest.raises(CheckpointError, match=re.escape(expected)):
            ask(TensorFiles(tmp_path), "x")


def test_shard_that_vanishes_after_opening(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    save_file(TENSORS, file)
    files = TensorFiles(tmp_path)
    file.unlink()
    with pytest.raises(CheckpointError, match=re.escape(f"{file}: tensor 'd' cannot be read (")):
        files.get("d")


@settings(max_examples=200)
@given(st.data())
def test_no_damaged_header_escapes_as_another_error(tmp_path: Path, data: st.DataObject) -> None:
    """Whatever bytes are cut off or changed, the file reads, or a CheckpointError tells why not."""
    whole = bytearray(save(TENSORS))
    header = 8 + int.from_bytes(whole[:8], "little")
    if data.draw(st.booleans()):
        whole = whole[: data.draw(st.integers(0, len(whole) - 1))]
    else:
        whole[data.draw(st.integers(0, header - 1))] = data.draw(st.integers(0, 255))
    file = tmp_path / "model.safetensors"
    file.write_bytes(whole)
    with contextlib.suppress(CheckpointError):
        files = TensorFiles(tmp_path)
        for name in files:
            files.get(name)


def test_header_of_an_unreadable_file(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="cannot be read: No such file or directory"):
        read_header(tmp_path / "model.safetensors")
