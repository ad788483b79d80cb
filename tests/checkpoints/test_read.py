from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from awqc.checkpoints import open_checkpoint
from awqc.errors import CheckpointError


def directory(path: Path, config: object) -> Path:
    save_file({"a.weight": torch.ones(2, 2)}, path / "model.safetensors")
    (path / "config.json").write_text(json.dumps(config))
    return path


def message(path: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(path)
    return str(caught.value)


def test_a_dense_checkpoint(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(directory(tmp_path, {"model_type": "x"}))
    assert checkpoint.format is None
    assert checkpoint.config == {"model_type": "x"}
    assert checkpoint.quantized_names() == []
    assert checkpoint.dense_names() == ["a.weight"]
    assert torch.equal(checkpoint.dense("a.weight"), torch.ones(2, 2))
    assert checkpoint.record() is None


def test_a_linear_that_is_not_quantized(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(directory(tmp_path, {}))
    with pytest.raises(CheckpointError) as caught:
        checkpoint.weight("a")
    assert str(caught.value) == f"{tmp_path}: linear 'a' is not stored quantized: read it with dense()"


def test_an_unknown_tensor(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(directory(tmp_path, {}))
    with pytest.raises(CheckpointError, match=r"has no tensor 'b\.weight' among its 1: "):
        checkpoint.dense("b.weight")


def test_an_unknown_quantization(tmp_path: Path) -> None:
    assert message(directory(tmp_path, {"quantization_config": {"quant_method": "gptq"}})) == (
        f"{tmp_path} is quantized with quant_method 'gptq': awqc reads awq, awqc, compressed-tensors"
    )


def test_no_config(tmp_path: Path) -> None:
    directory(tmp_path, {})
    (tmp_path / "config.json").unlink()
    assert message(tmp_path) == f"{tmp_path / 'config.json'} cannot be read: No such file or directory"


def test_a_config_that_is_no_object(tmp_path: Path) -> None:
    assert message(directory(tmp_path, [])) == (
        f"{tmp_path / 'config.json'} holds a list, not a JSON object: copy or download it again"
    )
