"""What a compile would make of a model, without its weights."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import awqc
from awqc.errors import CheckpointError, ConfigError
from awqc.inspection.outline import CAPTURED, find_hardware, outline
from awqc.inspection.subject import of_outline
from tests.models import llama

CONFIG = awqc.QuantConfig(group_size=32)


def ops(text: str) -> list[str]:
    return [found[1] for line in text.splitlines() if (found := re.search(r" = ([\w.]+)\(", line))]


def test_the_outline_is_what_the_compile_makes(
    config_only: Path, tiny_llama: LlamaForCausalLM, token_ids: Tensor
) -> None:
    """The same ops on the same operands, linear by linear, as a compile that has weights."""
    made = outline(config_only, CONFIG)
    compiled = awqc.compile(tiny_llama, token_ids, config=CONFIG)
    assert ops(made.graph.text()) == ops(compiled.graph.text())
    assert made.linears.keys() == compiled.quantized_linears().keys()
    for name, row in compiled.report.linears.items():
        outlined = made.report.linears[name]
        assert (outlined.decision, outlined.scheme, outlined.group, outlined.backend) == (
            (row.decision, row.scheme, row.group, row.backend)
        )


def test_nothing_has_values(config_only: Path) -> None:
    made = outline(config_only, CONFIG)
    assert {tensor.device.type for tensor in of_outline(made).tensors.values()} == {"meta"}


def test_for_a_gpu_that_is_not_here(config_only: Path) -> None:
    made = outline(config_only, CONFIG, hardware=find_hardware("h200"), tokens=1)
    assert {module.backend.name for module in made.linears.values()} == {"marlin"}
    assert "f16[1, 1, 64]" in made.graph.text()
    old = outline(config_only, CONFIG, backend="exllama", hardware=find_hardware("a100"), tokens=1)
    assert {module.backend.name for module in old.linears.values()} == {"exllama"}


def test_texts_of_passes(config_only: Path) -> None:
    made = outline(config_only, CONFIG, texts_of=[CAPTURED, "canonicalize", "quantize-linears", "lower"])
    assert list(made.texts) == [CAPTURED, "canonicalize", "quantize-linears", "lower"]
    assert "aten._assert_tensor_metadata" in ops(made.texts[CAPTURED])
    assert "aten._assert_tensor_metadata" not in ops(made.texts["canonicalize"])
    assert ops(made.texts["quantize-linears"]).count("awqc.qlinear") == 14
    assert made.texts["lower"] == made.graph.text()


def test_a_model_on_meta(tiny_llama: LlamaForCausalLM) -> None:
    with torch.device("meta"):
        module = AutoModelForCausalLM.from_config(tiny_llama.config).eval()
    assert len(outline(module, CONFIG).linears) == 14


def test_a_module_in_memory_is_left_alone() -> None:
    module = llama()
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    outline(module, CONFIG)
    assert all(torch.equal(before[name], tensor) for name, tensor in module.state_dict().items())


def test_a_large_model_takes_no_memory() -> None:
    """A layer of 70B shapes: its weights alone would take 1.7 GB in 16 bits."""
    config = LlamaConfig(
        hidden_size=8192,
        intermediate_size=28672,
        num_hidden_layers=2,
        num_attention_heads=64,
        num_key_value_heads=8,
        vocab_size=128256,
    )
    with torch.device("meta"):
        module = LlamaForCausalLM(config).eval()
    made = outline(module, hardware=find_hardware("h200"), tokens=1)
    down = made.linears["model.layers.1.mlp.down_proj"]
    (packed,) = [tensor for tensor in down.buffers()]
    assert packed.is_meta
    assert packed.numel() >= 8192 * 28672 // 2


def test_names_that_nothing_is_known_of(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nothing is known of a GPU 'h300': there are .*h200"):
        find_hardware("h300")
    with pytest.raises(ConfigError, match=r"torch cannot use device 'gpu9' here \("):
        find_hardware(None, "gpu9")
    with pytest.raises(CheckpointError, match="has no config that transformers can read"):
        outline(tmp_path)
