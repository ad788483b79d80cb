"""Scales at run time, from end to end: a model whose MLPs have a GELU in the middle."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import Starcoder2Config, Starcoder2ForCausalLM

import awqc
from awqc.capture import relative_error
from awqc.config import QuantConfig
from awqc.errors import CheckpointError
from awqc.runtime.compiled import CompiledModel
from awqc.runtime.input_scales import SUFFIX
from awqc.runtime.linear import QuantLinear

GELU = "aten.gelu (gelu): no scale passes through aten.gelu"
DOWN = [f"model.layers.{i}.mlp.c_proj" for i in range(2)]


@pytest.fixture(scope="module")
def model() -> Starcoder2ForCausalLM:
    """Some channels behind each GELU are large, so that a scale for them pays."""
    torch.manual_seed(0)
    config = Starcoder2Config(
        vocab_size=96,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.1,
        bos_token_id=1,
        eos_token_id=2,
    )
    model = Starcoder2ForCausalLM(config).eval()
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.c_fc.weight[::16] *= 12
            layer.mlp.c_proj.weight[:, ::16] /= 12
    return model


@pytest.fixture(scope="module")
def ids() -> Tensor:
    return torch.randint(3, 96, (16, 16), generator=torch.Generator().manual_seed(1))


def compiled(
    model: Starcoder2ForCausalLM, ids: Tensor, backend: str = "reference", **options: bool
) -> CompiledModel:
    return awqc.compile(model, ids, backend=backend, config=QuantConfig(group_size=32, **options))


@pytest.fixture(scope="module")
def scaled(model: Starcoder2ForCausalLM, ids: Tensor) -> CompiledModel:
    return compiled(model, ids, input_scales=True)


def logits(model: torch.nn.Module, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model(ids).logits


def test_linears_behind_a_gelu_are_scaled_and_gain(
    model: Starcoder2ForCausalLM, ids: Tensor, scaled: CompiledModel
) -> None:
    linears = scaled.quantized_linears()
    assert [name for name, linear in linears.items() if linear.input_scale is not None] == DOWN
    without = compiled(model, ids).report
    assert without.linears[f"{DOWN[0]}.weight"].no_group == GELU
    for name in DOWN:
        row = scaled.report.linears[f"{name}.weight"]
        assert row.group == name + SUFFIX
        assert row.no_group.startswith("aten.gelu")
        assert row.error is not None
        assert row.error < without.linears[f"{name}.weight"].error
        assert scaled.report.groups[name + SUFFIX].gain > 0
    assert (without.coverage, scaled.report.coverage) == (0.75, 1.0)  # 4096 + 2 x 2048 + 4096 + 6144 of 24576


def test_they_are_off_by_default(model: Starcoder2ForCausalLM, ids: Tensor) -> None:
    found = compiled(model, ids)
    assert all(linear.input_scale is None for linear in found.quantized_linears().values())
    assert not any(name.endswith(SUFFIX) for name in found.state_dict())


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_graph_modules_and_dequantized_weights_agree(
    model: Starcoder2ForCausalLM, ids: Tensor, backend: str
) -> None:
    found = compiled(model, ids, backend, input_scales=True)
    multiplied = [n for n in found.graph.graph.nodes if n.op == "get_attr" and str(n.target).endswith(SUFFIX)]
    assert [str(n.target) for n in multiplied] == [name + SUFFIX for name in DOWN]
    exact = logits(found, ids[:1])
    with torch.no_grad():
        assert relative_error(found.graph(ids[:1])[0], exact) < 1e-6
    # One linear alone: what the weights and the scale stand for, computed in float64.
    linear = found.get_submodule(DOWN[0])
    assert isinstance(linear, QuantLinear)
    assert linear.input_scale is not None
    weight, bias = linear.unpack()
    assert bias is not None
    x = torch.randn(3, 96)
    wanted = (x.double() * linear.input_scale) @ weight.dequantize().double().t() + bias
    # The cpu backend rounds activations to bfloat16, twice at most.
    eps = torch.finfo(torch.bfloat16 if backend == "cpu" else torch.float32).eps
    assert relative_error(linear(x), wanted) < 8 * eps


def test_half_precision_stays_half(scaled: CompiledModel) -> None:
    linear = scaled.get_submodule(DOWN[0])
    assert linear(torch.randn(2, 96, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_the_own_format_carries_them(scaled: CompiledModel, ids: Tensor, tmp_path: Path) -> None:
    again = awqc.load(scaled.save(tmp_path / "out", format="awqc"), backend="reference")
    for name in DOWN:
        assert torch.equal(again.get_submodule(name).input_scale, scaled.get_submodule(name).input_scale)
    # Dense tensors were rounded to half precision.
    assert relative_error(logits(again, ids), logits(scaled, ids)) < 64 * torch.finfo(torch.float16).eps
    assert again.report.linears[f"{DOWN[0]}.weight"].group == DOWN[0] + SUFFIX


@pytest.mark.parametrize("format", ["awq", "compressed-tensors"])
def test_formats_of_engines_refuse_them(scaled: CompiledModel, tmp_path: Path, format: str) -> None:
    with pytest.raises(CheckpointError) as error:
        scaled.save(tmp_path / "out", format=format)
    assert str(error.value) == (
        f"format {format!r} cannot store input scales, which are applied at run time: save as 'awqc', or "
        "compile without input_scales"
    )
    assert list(tmp_path.iterdir()) == []
