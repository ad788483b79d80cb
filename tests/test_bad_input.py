"""What users get wrong: one exact message each, naming the way out."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlamaForCausalLM

import awqc
from awqc import AwqcError, CompiledModel, QuantConfig
from awqc.errors import (
    BackendError,
    CalibrationError,
    CheckpointError,
    ConfigError,
    NonFiniteError,
)
from tests.models import llama

CONFIG = QuantConfig(group_size=32)


def refusal(kind: type[AwqcError], model: Any, calib: Any, **options: Any) -> str:
    with pytest.raises(kind) as caught:
        awqc.compile(model, calib, **{"config": CONFIG, **options})
    return str(caught.value)


@pytest.fixture
def model(tiny_llama: LlamaForCausalLM) -> LlamaForCausalLM:
    """One to break."""
    return copy.deepcopy(tiny_llama)


@pytest.fixture
def directory(tiny_llama: LlamaForCausalLM, tmp_path: Path) -> Path:
    """A checkpoint to break."""
    tiny_llama.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture(scope="module")
def compiled(tiny_llama: LlamaForCausalLM, token_ids: Tensor) -> CompiledModel:
    return awqc.compile(tiny_llama, token_ids, backend="reference", config=CONFIG)


# -- weights -----------------------------------------------------------------------------------------------

Q = "model.layers.1.self_attn.q_proj.weight"


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_not_finite(value: float, model: LlamaForCausalLM, token_ids: Tensor) -> None:
    with torch.no_grad():
        model.model.layers[1].self_attn.q_proj.weight[3, 7] = value
        model.model.layers[1].self_attn.q_proj.weight[9, 1] = value
    assert refusal(NonFiniteError, model, token_ids) == (
        f"parameter {Q!r} holds 2 NaN or Inf value(s), the first at index (3, 7): the checkpoint is damaged "
        "or was trained into overflow; repair the weight or use another checkpoint"
    )


def test_weights_on_disk_that_are_not_finite(directory: Path, token_ids: Tensor) -> None:
    tensors = load_file(directory / "model.safetensors")
    tensors["model.norm.weight"][5] = float("nan")
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    assert refusal(NonFiniteError, directory, token_ids) == (
        "parameter 'model.norm.weight' holds 1 NaN or Inf value(s), the first at index (5,): the checkpoint "
        "is damaged or was trained into overflow; repair the weight or use another checkpoint"
    )


def test_a_model_without_values(token_ids: Tensor, model: LlamaForCausalLM) -> None:
    assert refusal(ConfigError, model.to("meta"), token_ids) == (
        "parameter 'model.embed_tokens.weight' is on the meta device and has no values: awqc.analyze accepts "
        "such a model, awqc.compile needs one with weights or a checkpoint directory"
    )


# -- activations -------------------------------------------------------------------------------------------


def test_activations_that_overflow(token_ids: Tensor) -> None:
    """Attention scores near 1e40 are infinite in float32, and a softmax over infinities is NaN. Biases stay
    in float, so the quantized model overflows like the original."""
    model = llama(attention_bias=True)
    with torch.no_grad():
        attention = model.model.layers[1].self_attn
        attention.q_proj.bias.fill_(1e20)
        attention.k_proj.bias.fill_(1e20)
    # The names of nodes are those of the forward's own ops, which differ between versions of transformers.
    assert re.fullmatch(
        r"calibration sample 0 makes '(view|reshape)_\d+', the input of "
        r"'model\.layers\.1\.self_attn\.o_proj', NaN or Inf; the first op to do so is "
        r"aten\.scaled_dot_product_attention \(scaled_dot_product_attention_1\): check the weights it reads, "
        r"or leave the sample out",
        refusal(NonFiniteError, model, token_ids),
    )


# -- calibration data --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("calib", "source"),
    [
        ([], "the list given as calib"),
        (torch.empty(0, 16, dtype=torch.long), "the Tensor given as calib"),
        (torch.empty(4, 0, dtype=torch.long), "the Tensor given as calib"),
        ([[], []], "the list given as calib"),
    ],
)
def test_zero_tokens(calib: Any, source: str, tiny_llama: LlamaForCausalLM) -> None:
    assert refusal(CalibrationError, tiny_llama, calib) == (
        f"no calibration tokens: {source} is empty; give text or token ids, or calib='self'"
    )


def test_an_empty_file(tiny_llama: LlamaForCausalLM, tmp_path: Path) -> None:
    file = tmp_path / "empty.txt"
    file.write_text("")
    assert refusal(CalibrationError, tiny_llama, file) == (
        f"no calibration tokens: {file} is empty; give text or token ids, or calib='self'"
    )


def test_rows_longer_than_the_model_can_read(tiny_llama: LlamaForCausalLM) -> None:
    assert refusal(CalibrationError, tiny_llama, torch.ones(4, 65, dtype=torch.long)) == (
        "calibration row 0 has 65 tokens, longer than the model's limit of 64: cut it into rows of at most "
        "64 tokens"
    )


def test_sequences_longer_than_the_model_can_read(tiny_llama: LlamaForCausalLM, token_ids: Tensor) -> None:
    assert refusal(CalibrationError, tiny_llama, token_ids, max_calib_seq_len=100) == (
        "max_calib_seq_len=100 is longer than the model's limit of 64 tokens: give max_calib_seq_len=64 or "
        "less"
    )


def test_ids_of_another_vocabulary(tiny_llama: LlamaForCausalLM, token_ids: Tensor) -> None:
    ids = token_ids.clone()
    ids[2, 3] = 128
    assert refusal(CalibrationError, tiny_llama, ids) == (
        "token id 128 in calibration row 2 is outside the model's vocabulary of 128 tokens: use the "
        "tokenizer that belongs to the model"
    )


def test_text_without_a_tokenizer(tiny_llama: LlamaForCausalLM) -> None:
    assert refusal(CalibrationError, tiny_llama, ["some text"]) == (
        "the list given as calib is text: pass the model's tokenizer, or token ids instead"
    )


# -- options -----------------------------------------------------------------------------------------------


def test_a_directory_without_a_tokenizer(directory: Path, token_ids: Tensor, tmp_path: Path) -> None:
    said = refusal(ConfigError, directory, ["a text"])
    assert said.startswith(f"{directory} holds no tokenizer that transformers can load (")
    assert said.endswith("copy the tokenizer's files there, or pass tokenizer=... or token ids")
    ids = tmp_path / "ids.jsonl"  # which need none
    ids.write_text("".join(json.dumps({"input_ids": row}) + "\n" for row in token_ids.tolist()))
    assert awqc.compile(directory, str(ids), config=CONFIG, max_calib_seq_len=16).report.calibration[
        "samples"
    ]


def test_a_group_size_that_divides_nothing(tiny_llama: LlamaForCausalLM, token_ids: Tensor) -> None:
    message = refusal(ConfigError, tiny_llama, token_ids, config=QuantConfig(group_size=48))
    assert message == (
        "group_size=48 divides the input width of none of the 14 linears (64, 128): use 32, 64, 128, -1 "
        "(whole rows)"
    )


def test_a_width_that_does_not_exist() -> None:
    with pytest.raises(ConfigError) as caught:
        QuantConfig(bits=1)
    assert str(caught.value) == "bits=1: awqc quantizes to 2, 3, 4, 5, 6, 7 or 8 bits"


def test_a_propagation_that_does_not_exist() -> None:
    with pytest.raises(ConfigError) as caught:
        QuantConfig(propagate="none")  # type: ignore[arg-type]
    assert str(caught.value) == "propagate='none': choose 'quantized' or 'float'"


def test_an_unknown_backend(tiny_llama: LlamaForCausalLM, token_ids: Tensor) -> None:
    message = refusal(BackendError, tiny_llama, token_ids, backend="referense")
    names = ", ".join(["auto", *awqc.backend.backends()])
    assert message == f"unknown backend 'referense': choose one of {names}"
    assert "cpu" in names
    assert "reference" in names


def test_an_unknown_backend_is_noticed_before_anything_is_read(tmp_path: Path, token_ids: Tensor) -> None:
    refusal(BackendError, tmp_path / "no such model", token_ids, backend="referense")


def test_loading_for_an_unknown_backend(compiled: CompiledModel, tmp_path: Path) -> None:
    path = compiled.save(tmp_path / "out")
    with pytest.raises(BackendError, match=r"^unknown backend 'referense': choose one of auto, "):
        awqc.load(path, backend="referense")


# -- checkpoints that are read -----------------------------------------------------------------------------


def test_no_such_directory(tmp_path: Path, token_ids: Tensor) -> None:
    assert refusal(CheckpointError, tmp_path / "none", token_ids) == (
        f"{tmp_path / 'none'} is not a directory: give a local Hugging Face model directory, or a module in "
        "memory"
    )


def test_a_truncated_shard(directory: Path, token_ids: Tensor) -> None:
    file = directory / "model.safetensors"
    whole = file.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    file.write_bytes(whole[:-1000])
    assert refusal(CheckpointError, directory, token_ids) == (
        f"{file} is truncated: its header promises {len(whole) - header:,} bytes of data but the file holds "
        f"{len(whole) - header - 1000:,}: copy or download it again"
    )


def test_a_corrupt_shard(directory: Path, token_ids: Tensor) -> None:
    file = directory / "model.safetensors"
    whole = bytearray(file.read_bytes())
    whole[8:40] = b"x" * 32
    file.write_bytes(whole)
    message = refusal(CheckpointError, directory, token_ids)
    assert message.startswith(f"{file} is corrupt: ")
    assert message.endswith(": copy or download it again")


def test_a_shard_that_is_cut_off_after_a_save(compiled: CompiledModel, tmp_path: Path) -> None:
    path = compiled.save(tmp_path / "out")
    file = path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=r"is truncated: its header promises"):
        awqc.load(path)


def rewrite_config(directory: Path, **changes: Any) -> None:
    file = directory / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def test_shapes_that_the_config_contradicts(directory: Path, token_ids: Tensor) -> None:
    rewrite_config(directory, intermediate_size=96)
    assert refusal(CheckpointError, directory, token_ids) == (
        f"{directory}: tensor 'model.layers.0.mlp.gate_proj.weight' has shape (128, 64), but config.json "
        "describes (96, 64): config and weights belong to different models"
    )


def test_more_layers_than_the_files_hold(directory: Path, token_ids: Tensor) -> None:
    rewrite_config(directory, num_hidden_layers=3)
    assert refusal(CheckpointError, directory, token_ids) == (
        f"{directory} lacks 9 tensor(s) that its config asks for, such as "
        "'model.layers.2.input_layernorm.weight': the checkpoint is incomplete or belongs to another config"
    )


@pytest.mark.parametrize("format", ["awq", "compressed-tensors", "awqc"])
def test_quantized_shapes_that_the_config_contradicts(
    format: str, compiled: CompiledModel, tmp_path: Path
) -> None:
    path = compiled.save(tmp_path / "out", format=format)
    rewrite_config(path, intermediate_size=96)
    with pytest.raises(CheckpointError) as caught:
        awqc.load(path)
    assert str(caught.value) == (
        f"{path}: quantized linear 'model.layers.0.mlp.gate_proj' is (128, 64), but config.json describes "
        "(96, 64): config and weights belong to different models"
    )


def test_a_tensor_that_is_missing(compiled: CompiledModel, tmp_path: Path) -> None:
    path = compiled.save(tmp_path / "out")
    tensors = load_file(path / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError) as caught:
        awqc.load(path)
    assert str(caught.value) == (
        f"{path} lacks 1 tensor(s) that its config.json asks for, such as 'model.norm.weight': the "
        "checkpoint is incomplete; copy or save it again"
    )


def test_a_checkpoint_that_is_quantized_already(
    compiled: CompiledModel, tmp_path: Path, token_ids: Tensor
) -> None:
    path = compiled.save(tmp_path / "out")
    assert refusal(CheckpointError, path, token_ids) == (
        f"{path} is already quantized (awq): awqc compiles float checkpoints; use awqc.load to run this one"
    )


def test_loading_a_checkpoint_that_is_not_quantized(directory: Path) -> None:
    with pytest.raises(CheckpointError) as caught:
        awqc.load(directory)
    assert str(caught.value) == (
        f"{directory} holds no quantized linear: quantize it with awqc.compile, or load it with "
        "from_pretrained"
    )
