"""Compiled models that are saved, loaded, and lowered again."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM, PreTrainedModel

import awqc
from awqc import CompiledModel, QuantConfig, QuantizedWeight
from awqc.capture import relative_error
from awqc.checkpoints.awq import AwqFormat
from awqc.errors import CheckpointError
from awqc.observers.activations import Activations
from tests.models import gpt2, qwen2, ragged_llama
from tests.test_compile import ROUNDING, compiled_from, logits


@pytest.fixture(scope="module")
def compiled(tiny_llama: LlamaForCausalLM, token_ids: Tensor) -> CompiledModel:
    """``tiny_llama`` in 4 bits, groups of 32, on the reference backend. Not to be changed."""
    return compiled_from(tiny_llama, token_ids)


def half_rounded(model: CompiledModel) -> nn.Module:
    """``model`` with its dense tensors rounded as checkpoints of a float32 source store them."""
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.copy_(parameter.half())
        for linear in twin.quantized_linears().values():
            if linear._buffers.get("bias") is not None:
                linear.bias.copy_(linear.bias.half())
    return twin


FORMATS = {
    "awq": QuantConfig(group_size=32),
    "compressed-tensors": QuantConfig(group_size=32),
    "compressed-tensors symmetric": QuantConfig(group_size=32, zero_point=False),
    "awqc": QuantConfig(group_size=32),
    "awqc 3 bits, ragged": QuantConfig(bits=3, group_size=64),
}


@pytest.mark.parametrize("case", FORMATS)
@pytest.mark.parametrize("build", [ragged_llama, qwen2, gpt2])
def test_what_is_saved_is_what_is_loaded(
    case: str, build: Callable[[], PreTrainedModel], token_ids: Tensor, tmp_path: Path
) -> None:
    model = build()
    found = compiled_from(model, token_ids[:8], config=FORMATS[case])
    path = found.save(tmp_path / "out", format=case.split(" ")[0])
    assert path == (tmp_path / "out").resolve()
    loaded = awqc.load(path, backend="reference")
    assert type(loaded).__name__ == type(model).__name__
    twins = loaded.quantized_linears()
    for name, linear in found.quantized_linears().items():
        (weight, _), (again, _) = linear.unpack(), twins[name].unpack()
        for part in ("codes", "scales", "zeros"):
            assert torch.equal(getattr(weight, part), getattr(again, part)), name
    assert torch.equal(logits(loaded, token_ids), logits(half_rounded(found), token_ids))
    with torch.no_grad():
        found = loaded.graph(torch.arange(16)[None])[0]
    assert relative_error(found, logits(loaded, torch.arange(16)[None])) <= ROUNDING


def test_the_report_is_saved_along(compiled: CompiledModel, tmp_path: Path) -> None:
    loaded = awqc.load(compiled.save(tmp_path / "out"), backend="reference")
    assert loaded.report.to_json() == compiled.report.to_json()


def test_an_artifact_is_lowered_again_without_a_search(
    compiled: CompiledModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, token_ids: Tensor
) -> None:
    path = compiled.save(tmp_path / "artifact", format="awqc")

    def no_search(*args: Any) -> None:
        raise AssertionError("loading must not calibrate")

    monkeypatch.setattr(Activations, "observe", no_search)
    for backend in ("reference", "cpu"):
        loaded = awqc.load(path, backend=backend)
        linears = loaded.quantized_linears()
        assert {m.backend.name for m in linears.values()} == {backend}
        assert {row.backend for row in loaded.report.quantized()} == {backend}
        for name, linear in compiled.quantized_linears().items():
            assert torch.equal(linear.unpack()[0].codes, linears[name].unpack()[0].codes)
        # And on to a format that engines load.
        again = awqc.load(loaded.save(tmp_path / backend, format="awq"), backend="reference")
        assert torch.equal(logits(again, token_ids), logits(half_rounded(compiled), token_ids))


def test_from_a_directory_it_is_what_it_is_from_memory(
    compiled: CompiledModel, tiny_llama: LlamaForCausalLM, token_ids: Tensor, tmp_path: Path
) -> None:
    tiny_llama.save_pretrained(tmp_path / "model")
    found = compiled_from(tmp_path / "model", token_ids)
    for name, tensor in found.state_dict().items():
        assert torch.equal(tensor, compiled.state_dict()[name]), name
    assert torch.equal(logits(found, token_ids), logits(compiled, token_ids))
    prompt = token_ids[:1, :4]
    assert found.generate(prompt, max_new_tokens=3, do_sample=False).shape[1] > 4


def test_a_checkpoint_is_not_overwritten_unasked(compiled: CompiledModel, tmp_path: Path) -> None:
    compiled.save(tmp_path / "out")
    with pytest.raises(awqc.AwqcError) as caught:
        compiled.save(tmp_path / "out", format="awqc")
    assert str(caught.value) == (
        f"{(tmp_path / 'out').resolve()} already exists and is not empty: choose another output path, or "
        "pass overwrite=True (--overwrite) to replace it"
    )
    compiled.save(tmp_path / "out", format="awqc", overwrite=True)


def test_a_checkpoint_that_does_not_read_back_is_noticed(
    compiled: CompiledModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if the packing of a format were wrong."""
    encode = AwqFormat.encode

    def transposed(self: AwqFormat, name: str, weight: QuantizedWeight) -> Any:
        return encode(self, name, replace(weight, codes=weight.codes.flip(0)))

    monkeypatch.setattr(AwqFormat, "encode", transposed)
    with pytest.raises(CheckpointError) as caught:
        compiled.save(tmp_path / "out")
    assert re.fullmatch(
        rf"{re.escape(str(tmp_path / 'out'))} does not read back as the model that was saved: its first "
        r"stage differs by \d\.\de[+-]\d\d \(rounding explains 6\.2e-02\); do not use it, and report this",
        str(caught.value),
    )


def test_a_format_that_cannot_carry_the_scheme(
    tiny_llama: LlamaForCausalLM, token_ids: Tensor, tmp_path: Path
) -> None:
    model = compiled_from(tiny_llama, token_ids, config=QuantConfig(bits=3, group_size=32))
    with pytest.raises(awqc.AwqcError) as caught:
        model.save(tmp_path / "out", format="awq")
    assert "'awqc'" in str(caught.value)
    assert list(tmp_path.iterdir()) == []
