from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from awqc.checkpoints import AwqFormat, Checkpoint, check_format, open_checkpoint
from awqc.checkpoints.awq_layouts import pack_gemm, unpack_gemm
from awqc.errors import CheckpointError
from awqc.quantized import QuantizedWeight, Scheme
from tests.checkpoints import specification as spec
from tests.checkpoints.weights import random_weight, same, weights

CONFIG = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}


def gemm(weight: QuantizedWeight) -> dict[str, np.ndarray]:
    """Tensors of the linear "x", which other tests show to be right."""
    return {name: tensor.numpy() for name, tensor in AwqFormat().encode("x", weight).items()}


def gemv(weight: QuantizedWeight) -> dict[str, np.ndarray]:
    codes, scales, zeros = (t.numpy() for t in (weight.codes, weight.scales, weight.zeros))
    words = spec.zero_words(zeros.shape[1], weight.scheme.group(codes.shape[1]))
    return {
        "x.qweight": spec.write_natural(codes),
        "x.qzeros": spec.write_natural(spec.padded_to(8 * words, zeros)),
        "x.scales": spec.padded_to(8 * words, scales),
    }


def gemv_fast(weight: QuantizedWeight) -> dict[str, np.ndarray]:
    codes, scales, zeros = (t.numpy() for t in (weight.codes, weight.scales, weight.zeros))
    width = 8 * spec.zero_words(zeros.shape[1], weight.scheme.group(codes.shape[1]))
    products = (-(scales.astype(np.float32) * zeros)).astype(np.float16)
    return {
        "x.qweight": spec.write_gemv_fast(codes),
        "x.qzeros": np.ascontiguousarray(spec.padded_to(width, products).T),
        "x.scales": np.ascontiguousarray(spec.padded_to(width, scales).T),
    }


def marlin(weight: QuantizedWeight) -> dict[str, np.ndarray]:
    return {
        "x.qweight": spec.write_marlin(weight.codes.numpy()),
        "x.scales": spec.write_marlin_scales(weight.scales.numpy()),
    }


def opened(directory: Path, tensors: Mapping[str, np.ndarray], config: Mapping[str, Any]) -> Checkpoint:
    save_file(
        {name: np.ascontiguousarray(array) for name, array in tensors.items()},
        directory / "model.safetensors",
    )
    (directory / "config.json").write_text(json.dumps({"quantization_config": dict(config)}))
    return open_checkpoint(directory)


def refusal(directory: Path, tensors: Mapping[str, np.ndarray], config: Mapping[str, Any]) -> str:
    with pytest.raises(CheckpointError) as caught:
        opened(directory, tensors, config).weight("x")
    return str(caught.value)


def test_the_worked_example() -> None:
    """Eight output channels with the codes 0 to 7."""
    codes = torch.arange(8, dtype=torch.uint8).view(8, 1)
    assert pack_gemm(codes).tolist() == [[0x75316420]]
    assert torch.equal(unpack_gemm(torch.tensor([[0x75316420]], dtype=torch.int32)), codes)


def test_words_are_signed() -> None:
    assert pack_gemm(torch.full((8, 1), 15, dtype=torch.uint8)).tolist() == [[-1]]
    assert spec.read_gemm(np.array([[-1]], dtype=np.int32)).tolist() == [[15]] * 8


@given(weights(bits=st.just(4), n_multiple=8, ragged=False))
def test_what_is_written_is_what_the_specification_says(weight: QuantizedWeight) -> None:
    stored = AwqFormat().encode("m.x", weight)
    n, k = weight.codes.shape
    groups = weight.scales.shape[1]
    assert {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in stored.items()} == {
        "m.x.qweight": ((k, n // 8), torch.int32),
        "m.x.qzeros": ((groups, n // 8), torch.int32),
        "m.x.scales": ((groups, n), torch.float16),
    }
    assert spec.read_gemm(stored["m.x.qweight"].numpy()).tolist() == weight.codes.tolist()
    assert spec.read_gemm(stored["m.x.qzeros"].numpy()).tolist() == weight.zeros.tolist()
    assert stored["m.x.scales"].T.tolist() == weight.scales.tolist()


def test_symmetric_zero_points_are_written_out() -> None:
    stored = AwqFormat().encode("x", random_weight(16, 64, Scheme(4, 32, False)))
    assert set(stored["x.qzeros"].flatten().tolist()) == {0x88888888 - (1 << 32)}


@settings(max_examples=30)
@given(weight=weights(bits=st.just(4), n_multiple=8, ragged=False))
def test_gemm_comes_back(tmp_path: Path, weight: QuantizedWeight) -> None:
    config = {**CONFIG, "group_size": weight.scheme.group_size}
    checkpoint = opened(tmp_path, gemm(weight), config)
    assert checkpoint.quantized_names() == ["x"]
    assert checkpoint.shape("x") == tuple(weight.codes.shape)
    assert checkpoint.dense_names() == []
    assert same(checkpoint.weight("x"), weight)


SHAPES = [(128, 256, 128), (64, 384, 64), (192, 256, 32), (64, 128, -1), (64, 1152, 64)]


@pytest.mark.parametrize(("n", "k", "group"), SHAPES)
@pytest.mark.parametrize("zero_point", [True, False])
@pytest.mark.parametrize(
    ("version", "write"), [("gemv", gemv), ("gemv_fast", gemv_fast), ("GEMV", gemv), ("llm-awq", gemv_fast)]
)
def test_gemv_layouts_come_back(
    tmp_path: Path, version: str, write: Any, zero_point: bool, n: int, k: int, group: int
) -> None:
    weight = random_weight(n, k, Scheme(4, group, zero_point))
    config = {**CONFIG, "group_size": group, "version": version}
    assert same(opened(tmp_path, write(weight), config).weight("x"), weight)


@pytest.mark.parametrize(("n", "k", "group"), SHAPES)
def test_marlin_comes_back(tmp_path: Path, n: int, k: int, group: int) -> None:
    weight = random_weight(n, k, Scheme(4, group, False))
    config = {**CONFIG, "group_size": group, "version": "marlin", "zero_point": False}
    assert same(opened(tmp_path, marlin(weight), config).weight("x"), weight)


def test_zero_points_of_llm_awq_under_their_own_name(tmp_path: Path) -> None:
    weight = random_weight(64, 128, Scheme(4, 32))
    tensors = gemv_fast(weight)
    tensors["x.scaled_zeros"] = tensors.pop("x.qzeros")
    config = {**CONFIG, "backend": "llm-awq"}
    checkpoint = opened(tmp_path, tensors, config)
    assert same(checkpoint.weight("x"), weight)
    assert checkpoint.dense_names() == []


def test_a_dead_group_of_gemv_fast_stays_zero(tmp_path: Path) -> None:
    weight = random_weight(64, 128, Scheme(4, 32))
    weight.scales[3, 1] = 0
    weight.zeros[3, 1] = 0
    read = opened(tmp_path, gemv_fast(weight), {**CONFIG, "version": "gemv_fast"}).weight("x")
    assert same(read, weight)


def test_float_zero_points_that_are_no_integers(tmp_path: Path) -> None:
    tensors = gemv_fast(random_weight(64, 128, Scheme(4, 32)))
    tensors["x.qzeros"] = tensors["x.scales"] * np.float16(-2.5)
    assert refusal(tmp_path, tensors, {**CONFIG, "version": "gemv_fast"}) == (
        f"{tmp_path}, linear 'x': the zero points are not whole numbers from 0 to 15 after division by the "
        "scales: awqc reads integer zero points only"
    )


@pytest.mark.parametrize(
    "config",
    [
        {"quant_method": "awq", "w_bit": 4, "q_group_size": 32, "zero_point": True, "version": "GEMM"},
        {"quant_method": "awq", "bits": 4, "group_size": 32, "format": "gemm", "checkpoint_format": "gemm"},
        {"quant_method": "awq", "bits": 4, "group_size": 32, "checkpoint_format": "gemm"},
        {**CONFIG, "version": "exllama", "exllama_config": {"version": 2, "max_input_len": 2048}},
        {**CONFIG, "version": "exllamav2"},
        {**CONFIG, "modules_to_not_convert": ["lm_head"], "extra": {"ignored": True}},
    ],
)
def test_spellings_of_the_config(tmp_path: Path, config: dict[str, Any]) -> None:
    weight = random_weight(16, 64, Scheme(4, 32))
    assert same(opened(tmp_path, gemm(weight), config).weight("x"), weight)


@pytest.mark.parametrize("file", ["quant_config.json", "quantize_config.json"])
def test_config_in_a_file_of_its_own(tmp_path: Path, file: str) -> None:
    """Early checkpoints; their config.json knows nothing of quantization."""
    weight = random_weight(16, 64, Scheme(4, 32))
    opened(tmp_path, gemm(weight), CONFIG)
    (tmp_path / "config.json").write_text('{"model_type": "x"}')
    config = {"zero_point": True, "q_group_size": 32, "w_bit": 4, "version": "GEMM"}
    if file == "quantize_config.json":
        config = CONFIG
    (tmp_path / file).write_text(json.dumps(config))
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.format == "awq"
    assert same(checkpoint.weight("x"), weight)


@pytest.mark.parametrize("stored", [True, False])
def test_zero_point_false_with_and_without_qzeros(tmp_path: Path, stored: bool) -> None:
    """Other loaders read ``qzeros`` where there are any, whatever the flag says; so does awqc."""
    weight = random_weight(16, 64, Scheme(4, 32, stored))
    tensors = gemm(weight)
    if not stored:
        del tensors["x.qzeros"]
    read = opened(tmp_path, tensors, {**CONFIG, "zero_point": False}).weight("x")
    assert same(read, weight)


def test_missing_qzeros(tmp_path: Path) -> None:
    tensors = gemm(random_weight(16, 64, Scheme(4, 32)))
    del tensors["x.qzeros"]
    assert refusal(tmp_path, tensors, CONFIG) == (
        f"{tmp_path} has no tensor 'x.qzeros', which version='gemm' with bits=4 and group_size=32 in "
        "config.json asks for: the checkpoint is incomplete; copy or save it again"
    )


TOGETHER = (
    "weights and config do not belong together; restore the config.json that was saved with these weights"
)


def test_group_size_that_the_shapes_contradict(tmp_path: Path) -> None:
    tensors = gemm(random_weight(16, 128, Scheme(4, 32)))
    assert refusal(tmp_path, tensors, {**CONFIG, "group_size": 64}) == (
        f"{tmp_path / 'model.safetensors'}: tensor 'x.scales' has shape (4, 16), but version='gemm' with "
        f"bits=4 and group_size=64 in config.json asks for (2, 16): {TOGETHER}"
    )


@pytest.mark.parametrize("claimed", ["gemm", "gemv", "gemv_fast", "marlin"])
@pytest.mark.parametrize("write", [gemm, gemv, gemv_fast, marlin])
def test_version_that_the_shapes_contradict(tmp_path: Path, write: Any, claimed: str) -> None:
    if write.__name__ == claimed:
        return
    tensors = write(random_weight(128, 256, Scheme(4, 32, write is not marlin)))
    assert "but version=" in (message := refusal(tmp_path, tensors, {**CONFIG, "version": claimed}))
    assert message.endswith(TOGETHER)


def test_dtype_that_the_config_contradicts(tmp_path: Path) -> None:
    tensors = gemm(random_weight(16, 64, Scheme(4, 32)))
    tensors["x.qweight"] = tensors["x.qweight"].astype(np.int64)
    assert refusal(tmp_path, tensors, CONFIG) == (
        f"{tmp_path / 'model.safetensors'}: tensor 'x.qweight' has dtype torch.int64, but version='gemm' "
        f"with bits=4 and group_size=32 in config.json asks for torch.int32: {TOGETHER}"
    )


def test_versions_and_widths_that_nobody_reads(tmp_path: Path) -> None:
    tensors = gemm(random_weight(16, 64, Scheme(4, 32)))
    assert refusal(tmp_path, tensors, {**CONFIG, "version": "ipex"}) == (
        f"{tmp_path} has version='ipex' in its AWQ config: awqc reads gemm, exllama, exllamav2, gemv, "
        "gemv_fast, llm-awq, marlin"
    )
    assert refusal(tmp_path, tensors, {**CONFIG, "bits": 8}) == (
        f"{tmp_path} has bits=8 and group_size=32 in its AWQ config: awqc reads AWQ checkpoints with bits=4 "
        "and a whole number as group_size"
    )
    assert "group_size='32'" in refusal(tmp_path, tensors, {**CONFIG, "group_size": "32"})


def test_scales_of_other_dtypes_are_kept(tmp_path: Path) -> None:
    weight = random_weight(16, 64, Scheme(4, 32))
    weight = replace(weight, scales=weight.scales.float())
    tensors = gemm(weight)
    tensors["x.scales"] = weight.scales.t().contiguous().numpy()
    assert same(opened(tmp_path, tensors, CONFIG).weight("x"), weight)


@pytest.mark.parametrize("value", [1e5, 1e-9])
def test_scales_that_float16_cannot_hold(value: float) -> None:
    weight = random_weight(8, 32, Scheme(4, 32))
    weight = replace(weight, scales=torch.full((8, 1), value))
    with pytest.raises(CheckpointError) as caught:
        AwqFormat().encode("a.b", weight)
    assert str(caught.value) == (
        f"the scales of 'a.b' reach from {value:.3g} to {value:.3g}, which float16 cannot hold and AWQ files "
        "need: save as 'compressed-tensors' or 'awqc'"
    )


def test_the_config_that_is_written() -> None:
    schemes = {"a": Scheme(4, 64), "b": Scheme(4, 64, False)}
    assert AwqFormat().quantization_config(schemes, ["lm_head", "model.layers.0.mlp.gate"]) == {
        "quant_method": "awq",
        "bits": 4,
        "group_size": 64,
        "zero_point": True,
        "version": "gemm",
        "modules_to_not_convert": ["lm_head", "model.layers.0.mlp.gate"],
    }
    assert AwqFormat().quantization_config(schemes)["modules_to_not_convert"] is None


@pytest.mark.parametrize(
    ("shape", "reason"),
    [
        ((16, 64, Scheme(3, 32)), "its codes have 3 bits and those of AWQ files have 4"),
        ((12, 64, Scheme(4, 32)), "its 12 output channels are not a multiple of the 8 in a word"),
        ((16, 48, Scheme(4, 32)), "its 48 input channels are not a multiple of group_size=32"),
        ((16, 48, Scheme(4, -1)), None),
    ],
)
def test_what_awq_files_cannot_hold(shape: tuple[int, int, Scheme], reason: str | None) -> None:
    assert AwqFormat().refuses(*shape) == reason


def test_a_refusal_names_the_way_out() -> None:
    fits, too_wide = (16, 64, Scheme(4, 32)), (16, 64, Scheme(8, 32))
    with pytest.raises(CheckpointError) as caught:
        check_format("awq", {"a": fits, "b": too_wide, "c": too_wide})
    assert str(caught.value) == (
        "format 'awq' cannot store 'b' and 1 more: its codes have 8 bits and those of AWQ files have 4: "
        "keep it in 16 bits, or save as 'awqc' or 'compressed-tensors'"
    )
    check_format("awq", {"a": fits})


def test_mixed_group_sizes() -> None:
    linears = {"a": (16, 64, Scheme(4, 32)), "b": (16, 64, Scheme(4, 64)), "c": (16, 64, Scheme(4, 64))}
    with pytest.raises(CheckpointError) as caught:
        check_format("awq", linears)
    assert str(caught.value) == (
        "format 'awq' needs one group_size for all quantized linears, found 32 (in 1 of them), 64 (in 2 of "
        "them): compile with one group_size, or save as 'compressed-tensors' or 'awqc'"
    )


def test_a_quantized_output_head() -> None:
    with pytest.raises(CheckpointError) as caught:
        check_format("awq", {"lm_head": (16, 64, Scheme(4, 32))}, head="lm_head")
    assert str(caught.value) == (
        "format 'awq' cannot store the output head 'lm_head' quantized, since transformers would leave it "
        "with random weights: keep it in 16 bits, or save as 'compressed-tensors' or 'awqc'"
    )
