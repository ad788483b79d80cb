from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from awqc.checkpoints import Artifact, Checkpoint, check_format, open_checkpoint
from awqc.errors import CheckpointError
from awqc.quantized import QuantizedWeight, Scheme
from tests.checkpoints import specification as spec
from tests.checkpoints.weights import random_weight, same, weights

FORMAT = Artifact()


def opened(directory: Path, tensors: Mapping[str, torch.Tensor], config: Mapping[str, Any]) -> Checkpoint:
    save_file(dict(tensors), directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps({"quantization_config": dict(config)}))
    return open_checkpoint(directory)


def refusal(directory: Path, tensors: Mapping[str, torch.Tensor], config: Mapping[str, Any]) -> str:
    with pytest.raises(CheckpointError) as caught:
        opened(directory, tensors, config)
    return str(caught.value)


@given(weights(bits=st.integers(2, 8), n_multiple=1, ragged=True))
def test_what_is_written_is_what_the_specification_says(weight: QuantizedWeight) -> None:
    stored = FORMAT.encode("x", weight)
    bits = weight.scheme.bits
    n, k = weight.codes.shape
    groups = weight.scales.shape[1]
    assert stored["x.shape"].tolist() == [n, k]
    assert stored["x.codes"].shape == (n, -(-k // 8) * bits)
    assert spec.read_bits(stored["x.codes"].numpy(), bits, k).tolist() == weight.codes.tolist()
    assert spec.read_bits(stored["x.zeros"].numpy(), bits, groups).tolist() == weight.zeros.tolist()
    assert torch.equal(stored["x.scales"], weight.scales)


@settings(max_examples=50)
@given(weight=weights(bits=st.integers(2, 8), n_multiple=1, ragged=True))
def test_any_width_and_any_group_come_back(tmp_path: Path, weight: QuantizedWeight) -> None:
    assert FORMAT.refuses(*weight.codes.shape, weight.scheme) is None
    config = FORMAT.quantization_config({"x": weight.scheme})
    checkpoint = opened(tmp_path, FORMAT.encode("x", weight), config)
    assert checkpoint.shape("x") == tuple(weight.codes.shape)
    assert checkpoint.dense_names() == []
    assert same(checkpoint.weight("x"), weight)


def test_mixed_schemes(tmp_path: Path) -> None:
    stored = {
        "a": random_weight(3, 50, Scheme(3, 16)),
        "b": random_weight(3, 50, Scheme(3, 16)),
        "c": random_weight(5, 7, Scheme(8, -1, False)),
    }
    config = FORMAT.quantization_config({name: weight.scheme for name, weight in stored.items()}, ["lm_head"])
    assert config == {
        "quant_method": "awqc",
        "version": 1,
        "scheme": {"bits": 3, "group_size": 16, "zero_point": True},
        "exceptions": {"c": {"bits": 8, "group_size": -1, "zero_point": False}},
        "kept": ["lm_head"],
    }
    tensors = {k: v for name, weight in stored.items() for k, v in FORMAT.encode(name, weight).items()}
    checkpoint = opened(tmp_path, tensors, config)
    assert all(same(checkpoint.weight(name), weight) for name, weight in stored.items())


def test_nothing_quantized() -> None:
    with pytest.raises(CheckpointError) as caught:
        check_format("awqc", {})
    assert str(caught.value) == "format 'awqc' stores quantized linears and there are none: compile first"


def test_another_version(tmp_path: Path) -> None:
    weight = random_weight(4, 32, Scheme(4, 16))
    config = {**FORMAT.quantization_config({"x": weight.scheme}), "version": 2}
    assert refusal(tmp_path, FORMAT.encode("x", weight), config) == (
        f"{tmp_path} is an awqc artifact of version 2 and this awqc reads version 1: use the awqc that wrote "
        "it"
    )


@pytest.mark.parametrize(
    "change", [{"scheme": None}, {"scheme": {"bit": 4}}, {"exceptions": []}, {"exceptions": {"x": 4}}]
)
def test_a_config_that_says_nothing_of_schemes(tmp_path: Path, change: dict[str, Any]) -> None:
    weight = random_weight(4, 32, Scheme(4, 16))
    config = {**FORMAT.quantization_config({"x": weight.scheme}), **change}
    message = refusal(tmp_path, FORMAT.encode("x", weight), config)
    assert message.startswith(
        f"{tmp_path}: config.json does not say how the linears of this awqc artifact are quantized ("
    )
    assert message.endswith("): copy or save it again")


@pytest.mark.parametrize(
    ("claimed", "found"),
    [
        (
            Scheme(5, 16),
            "'x.codes' has shape (4, 16), but bits=5 with group_size=16 in config.json asks for (4, 20)",
        ),
        (
            Scheme(4, 8),
            "'x.scales' has shape (4, 2), but bits=4 with group_size=8 in config.json asks for (4, 4)",
        ),
    ],
)
def test_schemes_that_the_shapes_contradict(tmp_path: Path, claimed: Scheme, found: str) -> None:
    tensors = FORMAT.encode("x", random_weight(4, 32, Scheme(4, 16)))
    assert refusal(tmp_path, tensors, FORMAT.quantization_config({"x": claimed})) == (
        f"{tmp_path / 'model.safetensors'}: tensor {found}: weights and config do not belong together; "
        "restore the config.json that was saved with these weights"
    )


def test_an_empty_matrix(tmp_path: Path) -> None:
    tensors = FORMAT.encode("x", random_weight(4, 32, Scheme(4, 16)))
    tensors["x.codes"] = torch.zeros(4, 0, dtype=torch.uint8)
    assert refusal(tmp_path, tensors, FORMAT.quantization_config({"x": Scheme(4, 16)})) == (
        f"{tmp_path / 'model.safetensors'}: tensor 'x.codes' has shape (4, 0), but packed weights are "
        "matrices: the checkpoint does not follow its format; save it again"
    )
