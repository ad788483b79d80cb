"""What a checkpoint of quantized experts holds, and what is said when it does not fit."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import awqc
from awqc import CompiledModel, QuantConfig
from awqc.checkpoints import open_checkpoint
from awqc.errors import CheckpointError
from awqc.storage.contents import match_contents
from awqc.storage.source import skeleton
from tests.mixtures import EXPERTS, build, token_ids
from tests.zoo.catalog import CATALOG

SAMPLE = {"input_ids": token_ids(0, 1, 8)}
OF_EXPERT = "model.layers.0.block_sparse_moe.experts.1.w3"


def compiled(name: str, **changes: int) -> CompiledModel:
    config = QuantConfig(group_size=32, min_expert_tokens=0)
    return awqc.compile(build(name, **changes), token_ids(1, 4), backend="reference", config=config)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compiled("mixtral").save(tmp_path_factory.mktemp("saved") / "model", format="compressed-tensors")


def changed(saved: Path, out: Path, **tensors: torch.Tensor | None) -> Path:
    """``saved`` with tensors of one expert replaced, or taken away."""
    shutil.copytree(saved, out)
    files = load_file(out / "model.safetensors")
    for part, tensor in tensors.items():
        name = f"{OF_EXPERT}.{part}"
        del files[name]
        if tensor is not None:
            files[name] = tensor
    save_file(files, out / "model.safetensors", {"format": "pt"})
    return out


def test_every_expert_is_found(saved: Path) -> None:
    contents = match_contents(skeleton(saved), open_checkpoint(saved), SAMPLE)
    assert set(contents.stacks) == {
        f"model.layers.{layer}.mlp.experts.{part}"
        for layer in range(2)
        for part in ("gate_up_proj", "down_proj")
    }
    linears, transposed = contents.stacks["model.layers.0.mlp.experts.gate_up_proj"]
    assert not transposed
    assert len(linears) == 2 * EXPERTS
    assert OF_EXPERT in [linear.name for linear in linears]
    gate = contents.dense["model.layers.0.mlp.gate.weight"]
    assert [piece.name for piece in gate] == ["model.layers.0.block_sparse_moe.gate.weight"]


def test_an_expert_is_missing(saved: Path, tmp_path: Path) -> None:
    parts = ("weight_packed", "weight_scale", "weight_shape", "weight_zero_point")
    path = changed(saved, tmp_path / "out", **dict.fromkeys(parts))
    message = (
        f"{path} lacks 1 tensor(s) that its config.json asks for, such as "
        "'model.layers.0.mlp.experts.gate_up_proj': the checkpoint is incomplete; copy or save it again"
    )
    with pytest.raises(CheckpointError, match=re.escape(message)):
        awqc.load(path)


def test_an_expert_has_another_shape(saved: Path, tmp_path: Path) -> None:
    files = load_file(saved / "model.safetensors")
    half = {
        part: files[f"{OF_EXPERT}.{part}"][: files[f"{OF_EXPERT}.{part}"].shape[0] // 2].contiguous()
        for part in ("weight_packed", "weight_scale", "weight_zero_point")
    }
    path = changed(saved, tmp_path / "out", **half, weight_shape=torch.tensor([48, 64]))
    message = (
        f"{path}: quantized linear '{OF_EXPERT}' is (48, 64), but config.json describes (96, 64): config and "
        "weights belong to different models"
    )
    with pytest.raises(CheckpointError, match=re.escape(message)):
        awqc.load(path)


@pytest.mark.parametrize("name", ["granitemoe", "gpt_oss"])
def test_square_stacks_are_laid_out_as_the_forward_has_it(name: str, tmp_path: Path) -> None:
    """Nothing on disk tells (N, K) from (K, N) where the float checkpoint has stacks and both are equal."""
    model = compiled(name, intermediate_size=64)
    path = model.save(tmp_path / "out", format="awqc")
    contents = match_contents(skeleton(path), open_checkpoint(path), SAMPLE)
    assert {transposed for _, transposed in contents.stacks.values()} == {name == "gpt_oss"}
    loaded = awqc.load(path, backend="reference")
    for stack, expected in model.quantized_experts().items():
        found = loaded.quantized_experts()[stack]
        assert found.transposed == expected.transposed
        assert torch.equal(found.unpack()[0].codes, expected.unpack()[0].codes)


@pytest.mark.parametrize("kind", ["laguna", "nemotron_h"])
def test_linears_that_have_other_names_on_disk(kind: str, tmp_path: Path) -> None:
    """As transformers saves them: that is where engines look for them, and where they are found again."""
    if kind not in CATALOG:
        pytest.skip(f"this release of transformers has no {kind}")
    model = CATALOG[kind].build()
    config = QuantConfig(group_size=16, min_expert_tokens=0)
    quantized = awqc.compile(model, token_ids(1, 4, 16), backend="reference", config=config)
    path = quantized.save(tmp_path / "out", format="awqc")
    stored = {name for name in open_checkpoint(path).tensors if name.endswith(".codes")}
    renamed = {f"{name}.codes" for name in quantized.quantized_linears()} - stored
    assert renamed
    loaded = awqc.load(path, backend="reference")
    assert loaded.quantized_linears().keys() == quantized.quantized_linears().keys()
    for name, linear in quantized.quantized_linears().items():
        assert torch.equal(loaded.quantized_linears()[name].unpack()[0].codes, linear.unpack()[0].codes)
