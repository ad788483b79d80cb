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

from awqc.checkpoints import Checkpoint, CompressedTensors, check_format, open_checkpoint
from awqc.errors import CheckpointError
from awqc.quantized import QuantizedWeight, Scheme
from tests.checkpoints import specification as spec
from tests.checkpoints.weights import random_weight, same, weights

FORMAT = CompressedTensors()


def opened(
    directory: Path,
    tensors: Mapping[str, torch.Tensor],
    config: Mapping[str, Any],
    key: str = "quantization_config",
) -> Checkpoint:
    save_file(dict(tensors), directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps({key: dict(config)}))
    return open_checkpoint(directory)


def refusal(directory: Path, tensors: Mapping[str, torch.Tensor], config: Mapping[str, Any]) -> str:
    with pytest.raises(CheckpointError) as caught:
        opened(directory, tensors, config)
    return str(caught.value)


@given(weights(bits=st.sampled_from([4, 8]), n_multiple=8, ragged=False))
def test_what_is_written_is_what_the_specification_says(weight: QuantizedWeight) -> None:
    stored = FORMAT.encode("m.x", weight)
    bits = weight.scheme.bits
    n, k = weight.codes.shape
    shapes = {
        "m.x.weight_packed": ((n, k * bits // 32), torch.int32),
        "m.x.weight_scale": ((n, weight.scales.shape[1]), torch.float16),
        "m.x.weight_shape": ((2,), torch.int64),
    }
    if weight.scheme.zero_point:
        shapes["m.x.weight_zero_point"] = ((n * bits // 32, weight.scales.shape[1]), torch.int32)
    assert {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in stored.items()} == shapes
    assert stored["m.x.weight_shape"].tolist() == [n, k]
    assert torch.equal(stored["m.x.weight_scale"], weight.scales)
    codes = spec.read_natural(stored["m.x.weight_packed"].numpy(), bits)
    assert codes.tolist() == weight.codes.tolist()
    if weight.scheme.zero_point:
        zeros = spec.read_natural(stored["m.x.weight_zero_point"].numpy().T, bits).T
        assert zeros.tolist() == weight.zeros.tolist()


@settings(max_examples=30)
@given(weight=weights(bits=st.sampled_from([4, 8]), n_multiple=8, ragged=False))
def test_it_comes_back(tmp_path: Path, weight: QuantizedWeight) -> None:
    config = FORMAT.quantization_config({"x": weight.scheme})
    checkpoint = opened(tmp_path, FORMAT.encode("x", weight), config)
    assert checkpoint.format == "compressed-tensors"
    assert checkpoint.quantized_names() == ["x"]
    assert checkpoint.shape("x") == tuple(weight.codes.shape)
    assert checkpoint.dense_names() == []
    assert same(checkpoint.weight("x"), weight)


def test_input_channels_that_do_not_fill_the_last_word(tmp_path: Path) -> None:
    """Other tools pad; only ``weight_shape`` tells how far the codes reach."""
    weight = random_weight(12, 20, Scheme(4, -1))
    padded = torch.from_numpy(spec.write_natural(weight.codes.numpy()))
    zeros = torch.from_numpy(spec.write_natural(weight.zeros.numpy().T).T.copy())
    tensors = {
        "x.weight_packed": padded,
        "x.weight_scale": weight.scales,
        "x.weight_shape": torch.tensor([12, 20]),
        "x.weight_zero_point": zeros,
    }
    assert same(
        opened(tmp_path, tensors, FORMAT.quantization_config({"x": weight.scheme})).weight("x"), weight
    )


def test_without_weight_shape_the_words_tell(tmp_path: Path) -> None:
    weight = random_weight(16, 64, Scheme(4, 32, False))
    tensors = FORMAT.encode("x", weight)
    del tensors["x.weight_shape"]
    assert same(
        opened(tmp_path, tensors, FORMAT.quantization_config({"x": weight.scheme})).weight("x"), weight
    )


def test_the_config_of_one_scheme() -> None:
    config = FORMAT.quantization_config({"a": Scheme(4, 64, False), "b": Scheme(4, 64, False)}, ["lm_head"])
    assert config == {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "global_compression_ratio": None,
        "kv_cache_scheme": None,
        "ignore": ["lm_head"],
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "format": "pack-quantized",
                "input_activations": None,
                "output_activations": None,
                "weights": {
                    "num_bits": 4,
                    "type": "int",
                    "symmetric": True,
                    "strategy": "group",
                    "group_size": 64,
                    "dynamic": False,
                    "actorder": None,
                    "block_structure": None,
                    "observer": "minmax",
                    "observer_kwargs": {},
                },
            }
        },
        "version": "0.20.0",
    }


def test_asymmetric_weights_are_to_be_dequantized_where_that_is_all_that_works() -> None:
    one, other = Scheme(4, 64, True), Scheme(8, 64, True)
    assert FORMAT.quantization_config({"a": one, "b": one})["dequantize"] is True
    assert "dequantize" not in FORMAT.quantization_config({"a": one, "b": other})


def test_whole_rows_are_the_channel_strategy() -> None:
    group = FORMAT.quantization_config({"a": Scheme(8, -1, False)})["config_groups"]["group_0"]
    assert (group["weights"]["strategy"], group["weights"]["group_size"]) == ("channel", None)


def test_a_quantized_output_head_is_named() -> None:
    schemes = {"a": Scheme(4, 64), "lm_head": Scheme(4, 64)}
    groups = FORMAT.quantization_config(schemes, head="lm_head")["config_groups"]
    assert groups["group_0"]["targets"] == ["Linear", "lm_head"]
    assert FORMAT.quantization_config({"a": Scheme(4, 64)}, head="lm_head")["config_groups"]["group_0"][
        "targets"
    ] == ["Linear"]


def test_mixed_schemes_are_groups_of_full_names(tmp_path: Path) -> None:
    stored = {
        "m.0.down": random_weight(16, 64, Scheme(8, 32, False)),
        "m.0.up": random_weight(16, 64, Scheme(4, 32, False)),
        "m.1.up": random_weight(16, 64, Scheme(4, 32, False), seed=1),
        "m.1.down": random_weight(16, 64, Scheme(4, -1, True)),
    }
    config = FORMAT.quantization_config({name: weight.scheme for name, weight in stored.items()})
    assert [group["targets"] for group in config["config_groups"].values()] == [
        ["m.0.down"],
        ["m.0.up", "m.1.up"],
        ["m.1.down"],
    ]
    tensors = {k: v for name, weight in stored.items() for k, v in FORMAT.encode(name, weight).items()}
    checkpoint = opened(tmp_path, tensors, config)
    assert all(same(checkpoint.weight(name), weight) for name, weight in stored.items())


def test_targets_by_name_go_before_patterns_and_patterns_before_classes(tmp_path: Path) -> None:
    wide, narrow, rows = Scheme(8, 32, False), Scheme(4, 32, False), Scheme(4, -1, False)
    stored = {
        "m.down": random_weight(16, 64, wide),
        "m.up": random_weight(16, 64, narrow),
        "n": random_weight(8, 64, rows),
    }
    config = FORMAT.quantization_config({name: weight.scheme for name, weight in stored.items()})
    targets = {"group_0": ["m.down"], "group_1": [r"re:m\..*"], "group_2": ["Linear"]}
    for group, names in targets.items():
        config["config_groups"][group]["targets"] = names
    config["config_groups"] = dict(reversed(config["config_groups"].items()))
    tensors = {k: v for name, weight in stored.items() for k, v in FORMAT.encode(name, weight).items()}
    checkpoint = opened(tmp_path, tensors, config, key="compression_config")
    assert all(same(checkpoint.weight(name), weight) for name, weight in stored.items())


TOGETHER = (
    "weights and config do not belong together; restore the config.json that was saved with these weights"
)


def test_a_linear_that_no_group_targets(tmp_path: Path) -> None:
    weight = random_weight(16, 64, Scheme(4, 32))
    config = FORMAT.quantization_config({"x": weight.scheme})
    config["config_groups"]["group_0"]["targets"] = ["y"]
    assert refusal(tmp_path, FORMAT.encode("x", weight), config) == (
        f"{tmp_path}: linear 'x' is stored packed, but no group of config_groups in config.json targets it: "
        f"{TOGETHER}"
    )


@pytest.mark.parametrize(
    ("claimed", "expected"),
    [
        (
            Scheme(4, 16),
            "tensor 'x.weight_scale' has shape (16, 2), but num_bits=4 with group_size=16 in config.json "
            "asks for (16, 4)",
        ),
        (
            Scheme(8, 32),
            "tensor 'x.weight_packed' has shape (16, 8), but num_bits=8 with group_size=32 in config.json "
            "asks for (16, 16)",
        ),
    ],
)
def test_schemes_that_the_shapes_contradict(tmp_path: Path, claimed: Scheme, expected: str) -> None:
    tensors = FORMAT.encode("x", random_weight(16, 64, Scheme(4, 32)))
    config = FORMAT.quantization_config({"x": claimed})
    assert refusal(tmp_path, tensors, config) == f"{tmp_path / 'model.safetensors'}: {expected}: {TOGETHER}"


def test_missing_zero_points(tmp_path: Path) -> None:
    tensors = FORMAT.encode("x", random_weight(16, 64, Scheme(4, 32)))
    del tensors["x.weight_zero_point"]
    assert refusal(tmp_path, tensors, FORMAT.quantization_config({"x": Scheme(4, 32)})) == (
        f"{tmp_path} has no tensor 'x.weight_zero_point', which num_bits=4 with group_size=32 in config.json "
        "asks for: the checkpoint is incomplete; copy or save it again"
    )


def test_reordered_input_channels(tmp_path: Path) -> None:
    tensors = FORMAT.encode("x", random_weight(16, 64, Scheme(4, 32, False)))
    tensors["x.weight_g_idx"] = torch.zeros(64, dtype=torch.int32)
    assert refusal(tmp_path, tensors, FORMAT.quantization_config({"x": Scheme(4, 32, False)})) == (
        f"{tmp_path}: linear 'x' has its input channels reordered (weight_g_idx), which awqc cannot read: "
        "save it without activation ordering"
    )


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ({"format": "float-quantized"}, "format 'float-quantized'"),
        ({"input_activations": {"num_bits": 8}}, "quantized activations"),
        ({"weights": {"num_bits": 3, "type": "int"}}, "weights of 3 bits and type 'int'"),
        ({"weights": {"num_bits": 4, "type": "float"}}, "weights of 4 bits and type 'float'"),
        ({"weights": {"num_bits": 4, "type": "int", "strategy": "block"}}, "strategy 'block'"),
    ],
)
def test_other_kinds_of_compressed_tensors(tmp_path: Path, change: dict[str, Any], found: str) -> None:
    tensors = FORMAT.encode("x", random_weight(16, 64, Scheme(4, 32, False)))
    config = FORMAT.quantization_config({"x": Scheme(4, 32, False)})
    config["config_groups"]["group_0"].update(change)
    assert refusal(tmp_path, tensors, config) == (
        f"{tmp_path} is a compressed-tensors checkpoint with {found}: awqc reads 'pack-quantized' with "
        "integer weights of 4 or 8 bits, by group or channel"
    )


@pytest.mark.parametrize(
    ("shape", "reason"),
    [
        ((16, 64, Scheme(3, 32)), "its codes have 3 bits and those of packed compressed-tensors have 4 or 8"),
        ((16, 60, Scheme(4, -1)), "its 60 input channels are not a multiple of the 8 in a word"),
        ((12, 64, Scheme(4, 32)), "its zero points for 12 output channels do not fill words of 8"),
        ((12, 64, Scheme(4, 32, False)), None),
        ((12, 64, Scheme(8, 32)), None),
        ((16, 48, Scheme(4, 32)), "its 48 input channels are not a multiple of group_size=32"),
    ],
)
def test_what_compressed_tensors_cannot_hold(shape: tuple[int, int, Scheme], reason: str | None) -> None:
    assert FORMAT.refuses(*shape) == reason


def test_a_refusal_names_the_way_out() -> None:
    with pytest.raises(CheckpointError) as caught:
        check_format("compressed-tensors", {"a": (16, 64, Scheme(3, 32))})
    assert str(caught.value) == (
        "format 'compressed-tensors' cannot store 'a': its codes have 3 bits and those of packed "
        "compressed-tensors have 4 or 8: keep it in 16 bits, or save as 'awqc'"
    )
