"""The harness itself, on checkpoints written from the formats' descriptions: engines agree with the dense
twin, and a checkpoint that is wrong in a way that loads is told apart."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from transformers import AutoModelForCausalLM

from tests.interop import agreement, specification, tiny
from tests.interop.engines import ENGINES

GROUP = 32


def expected(twin: Path) -> agreement.Yardstick:
    model = AutoModelForCausalLM.from_pretrained(twin, dtype=torch.float32).eval()
    return agreement.yardstick(model, model.config.num_hidden_layers, tiny.prompts(), count=4)


@pytest.mark.interop
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("form", specification.FORMS)
@pytest.mark.parametrize("family", [tiny.llama, tiny.qwen2])
def test_engine_agrees_with_the_dense_twin(family, form, engine, tmp_path):
    checkpoint = tmp_path / "packed"
    twin = specification.write(family(tmp_path / "dense"), checkpoint, form, GROUP)
    yardstick = expected(twin)
    answer = ENGINES[engine](checkpoint, yardstick.prompts, tmp_path)
    print(agreement.summary(answer, yardstick))
    agreement.check(answer, yardstick, checkpoint)


@pytest.mark.interop
@pytest.mark.parametrize("engine", ENGINES)
def test_zero_points_off_by_one_are_noticed(engine, tmp_path):
    """GPTQ stores z - 1 in the same place: the classic mistake, which loads without a word."""
    checkpoint = tmp_path / "packed"
    twin = specification.write(tiny.llama(tmp_path / "dense"), checkpoint, "awq", GROUP)
    tensors = load_file(checkpoint / "model.safetensors")
    name = "model.layers.0.mlp.down_proj.qzeros"
    tensors[name] = tensors[name] - np.int32(1)  # the lowest four bits, so one output channel in eight
    save_file(tensors, checkpoint / "model.safetensors", metadata={"format": "pt"})
    yardstick = expected(twin)
    answer = ENGINES[engine](checkpoint, yardstick.prompts, tmp_path)
    with pytest.raises(AssertionError, match="log probabilities are off by"):
        agreement.check(answer, yardstick, checkpoint)


@pytest.mark.interop
def test_a_tensor_that_transformers_did_not_find_is_noticed(tmp_path):
    """Leaves its zero points at 0 and only warns."""
    checkpoint = tmp_path / "packed"
    twin = specification.write(tiny.llama(tmp_path / "dense"), checkpoint, "awq", GROUP)
    tensors = load_file(checkpoint / "model.safetensors")
    del tensors["model.layers.1.self_attn.o_proj.qzeros"]
    save_file(tensors, checkpoint / "model.safetensors", metadata={"format": "pt"})
    yardstick = expected(twin)
    answer = ENGINES["transformers"](checkpoint, yardstick.prompts, tmp_path)
    with pytest.raises(AssertionError, match=r"missing keys: \['model.layers.1.self_attn.o_proj.qzeros'\]"):
        agreement.check(answer, yardstick, checkpoint)


def test_codes_are_packed_as_in_the_worked_example():
    """Codes 0..7 of eight output channels make the word 0x75316420 in AutoAWQ's order."""
    assert specification.awq_words(np.arange(8)[None]).item() == 0x75316420
    assert specification.ordered_words(np.arange(8)[None]).item() == 0x76543210
    assert specification.word([15] * 8) == -1
