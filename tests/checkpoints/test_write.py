from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.numpy import load_file

from awqc.checkpoints import SearchRecord, get_format, open_checkpoint, write_checkpoint
from awqc.errors import CheckpointError
from awqc.quantized import QuantizedWeight, Scheme, stack
from tests.checkpoints import specification as spec
from tests.checkpoints.weights import random_weight, same

CONFIG = {"model_type": "any", "torch_dtype": "bfloat16", "rope": {"theta": 1.0}, "architectures": ["X"]}


def quantized(bits: int = 4) -> dict[str, QuantizedWeight]:
    return {f"layer.{i}.up": random_weight(16, 64, Scheme(bits, 32), seed=i) for i in range(3)}


def dense() -> list[tuple[str, torch.Tensor]]:
    return [
        ("embed.weight", torch.randn(10, 4, dtype=torch.bfloat16)),
        ("layer.0.up.bias", torch.ones(16, dtype=torch.float16)),
        ("lm_head.weight", torch.zeros(10, 4)),
    ]


def write(out: Path, **changes: Any) -> Path:
    arguments: dict[str, Any] = {
        "format": "awq",
        "tensors": dense(),
        "quantized": quantized(),
        "config": CONFIG,
        "kept": ["lm_head"],
    }
    return write_checkpoint(out, **{**arguments, **changes})


def written_config(out: Path) -> dict[str, Any]:
    return json.loads((out / "config.json").read_text())


def refusal(out: Path, **changes: Any) -> str:
    with pytest.raises(CheckpointError) as caught:
        write(out, **changes)
    assert not out.exists()
    return str(caught.value)


@pytest.mark.parametrize("format", ["awq", "compressed-tensors", "awqc"])
@pytest.mark.parametrize("max_shard_bytes", [1000, 10**9])
def test_everything_comes_back(tmp_path: Path, format: str, max_shard_bytes: int) -> None:
    tensors = dense()
    out = write(tmp_path / "out", format=format, tensors=iter(tensors), max_shard_bytes=max_shard_bytes)
    assert out == tmp_path / "out"
    assert (out / "model.safetensors").exists() == (max_shard_bytes > 1000)
    checkpoint = open_checkpoint(out)
    assert checkpoint.format == format
    assert sorted(checkpoint.quantized_names()) == sorted(quantized())
    assert all(same(checkpoint.weight(name), weight) for name, weight in quantized().items())
    assert sorted(checkpoint.dense_names()) == sorted(name for name, _ in tensors)
    for name, tensor in tensors:
        assert checkpoint.dense(name).dtype == tensor.dtype
        assert torch.equal(checkpoint.dense(name), tensor)


def test_an_independent_reader_agrees(tmp_path: Path) -> None:
    tensors = load_file(write(tmp_path / "out", tensors=dense()[1:]) / "model.safetensors")
    for name, weight in quantized().items():
        assert spec.read_gemm(tensors[f"{name}.qweight"]).tolist() == weight.codes.tolist()
        assert spec.read_gemm(tensors[f"{name}.qzeros"]).tolist() == weight.zeros.tolist()
        assert tensors[f"{name}.scales"].T.tolist() == weight.scales.tolist()


def test_the_source_config_is_kept_but_for_the_quantization(tmp_path: Path) -> None:
    config = {**CONFIG, "quantization_config": {"quant_method": "fp8"}}
    written = written_config(write(tmp_path / "out", config=config))
    block = written.pop("quantization_config")
    assert block["quant_method"] == "awq"
    assert block["modules_to_not_convert"] == ["lm_head"]
    assert written == CONFIG
    assert config["quantization_config"] == {"quant_method": "fp8"}


@pytest.mark.parametrize(
    ("source", "dtype", "expected"),
    [
        ({"torch_dtype": "bfloat16"}, None, {"torch_dtype": "bfloat16"}),
        ({"dtype": "float16"}, None, {"dtype": "float16"}),
        ({"dtype": "float32"}, None, {"dtype": "float16"}),
        ({"torch_dtype": "float32"}, torch.bfloat16, {"torch_dtype": "bfloat16"}),
        ({}, None, {"torch_dtype": "float16"}),
        ({"text": {"dtype": "float32", "a": 1}}, None, {"text": {"dtype": "float16", "a": 1}}),
        ({"text": {"dtype": "bfloat16"}}, None, {"text": {"dtype": "bfloat16"}}),
        ({"dtype": "bfloat16"}, torch.float16, {"dtype": "float16"}),
    ],
)
def test_the_dtype_is_one_that_engines_accept(
    tmp_path: Path, source: dict[str, Any], dtype: torch.dtype | None, expected: dict[str, Any]
) -> None:
    before = copy.deepcopy(source)
    written = written_config(write(tmp_path / "out", config=source, dtype=dtype))
    del written["quantization_config"]
    assert written == expected
    assert source == before


def test_an_artifact_keeps_the_dtype_of_its_source(tmp_path: Path) -> None:
    out = write(tmp_path / "out", config={"dtype": "float32"}, format="awqc")
    assert written_config(out)["dtype"] == "float32"


def test_a_dtype_that_no_engine_accepts(tmp_path: Path) -> None:
    assert refusal(tmp_path / "out", dtype=torch.float32) == (
        "dtype=torch.float32 in a checkpoint of format 'awq': its engines compute in torch.float16 or "
        "torch.bfloat16 only"
    )


def test_tokenizer_and_the_like_are_copied_but_neither_code_nor_weights(tmp_path: Path) -> None:
    source = tmp_path / "source"
    (source / "additional_chat_templates").mkdir(parents=True)
    copied = [
        "tokenizer.json",
        "tokenizer_config.json",
        "tokenizer.model",
        "special_tokens_map.json",
        "added_tokens.json",
        "vocab.json",
        "vocab.txt",
        "merges.txt",
        "generation_config.json",
        "preprocessor_config.json",
        "chat_template.jinja",
        "additional_chat_templates/tool_use.jinja",
        "LICENSE",
    ]
    left = [
        "config.json",
        "model.safetensors",
        "model.safetensors.index.json",
        "pytorch_model.bin",
        "pytorch_model.bin.index.json",
        "x.pt",
        "modeling_x.py",
        "quant_config.json",
        "quantize_config.json",
        "awqc.json",
        "README.md",
    ]
    for name in [*copied, *left]:
        (source / name).write_text(name)
    out = write(tmp_path / "out", files_from=source)
    found = {str(file.relative_to(out)) for file in out.rglob("*") if file.is_file()}
    assert found == {*copied, "config.json", "model.safetensors"}
    assert all((out / name).read_text() == name for name in copied)


def test_documents_and_record(tmp_path: Path) -> None:
    record = SearchRecord({"bits": 4}, "f", {"g": 0.5}, {"g": torch.ones(2)})
    out = write(tmp_path / "out", format="awqc", record=record, documents={"report.txt": "all well"})
    assert (out / "report.txt").read_text() == "all well"
    read = open_checkpoint(out).record()
    assert read is not None
    assert read.ratios == {"g": 0.5}


def test_a_record_beside_weights_that_engines_load(tmp_path: Path) -> None:
    assert refusal(tmp_path / "out", record=SearchRecord({}, "f")) == (
        "a search record cannot go into format 'awq', whose engines would take its tensors for weights: "
        "save it as 'awqc'"
    )


@pytest.mark.parametrize("format", ["awq", "compressed-tensors"])
def test_an_artifact_lowers_to_any_format_without_a_search(tmp_path: Path, format: str) -> None:
    """Written from the artifact or directly, the files are the same, byte for byte."""
    direct = write(tmp_path / "direct", format=format)
    artifact = open_checkpoint(write(tmp_path / "artifact", format="awqc", tensors=dense()))
    again = write_checkpoint(
        tmp_path / "again",
        format=format,
        tensors=[(name, artifact.dense(name)) for name in artifact.dense_names() if name != "embed.weight"],
        quantized={name: artifact.weight(name) for name in artifact.quantized_names()},
        config=artifact.config,
        kept=artifact.config["quantization_config"]["kept"],
    )
    assert (again / "config.json").read_bytes() == (direct / "config.json").read_bytes()
    one, other = open_checkpoint(direct).tensors, open_checkpoint(again).tensors
    assert {*one} - {*other} == {"embed.weight"}
    assert all(torch.equal(one.get(name), other.get(name)) for name in other)


def test_a_linear_that_the_format_cannot_store(tmp_path: Path) -> None:
    assert refusal(tmp_path / "out", quantized=quantized(bits=3)) == (
        "format 'awq' cannot store 'layer.0.up' and 2 more: its codes have 3 bits and those of AWQ files "
        "have 4: keep it in 16 bits, or save as 'awqc'"
    )


def test_an_unknown_format(tmp_path: Path) -> None:
    assert refusal(tmp_path / "out", format="gguf") == (
        "unknown checkpoint format 'gguf': choose one of awq, awqc, compressed-tensors"
    )


def test_dense_weight_of_a_quantized_linear(tmp_path: Path) -> None:
    tensors = [("layer.1.up.weight", torch.zeros(16, 64))]
    assert refusal(tmp_path / "out", tensors=tensors) == (
        "'layer.1.up' is quantized and its dense weight 'layer.1.up.weight' was given too: leave it out"
    )


def test_a_failed_save_leaves_what_was_there(tmp_path: Path) -> None:
    out = write(tmp_path / "out")
    before = {file.name: file.read_bytes() for file in out.iterdir()}

    def interrupted() -> Iterator[tuple[str, torch.Tensor]]:
        yield from dense()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write(out, tensors=interrupted(), max_shard_bytes=100, overwrite=True)
    assert {file.name: file.read_bytes() for file in out.iterdir()} == before
    assert list(tmp_path.iterdir()) == [out]


def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=50)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    out = tmp_path / "out"
    message = refusal(out)
    assert message.startswith(f"the disk is full: {out} needs more than ")
    assert message.endswith("are available there: free some space or choose another output path")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("format", ["awq", "compressed-tensors", "awqc"])
@pytest.mark.parametrize("scheme", [Scheme(4, 32), Scheme(4, 32, False)])
def test_linears_that_are_encoded_at_once_are_those_encoded_alone(format: str, scheme: Scheme) -> None:
    alone = [random_weight(16, 64, scheme, seed) for seed in range(3)]
    together = get_format(format).encode("x", stack(alone))
    for e, weight in enumerate(alone):
        for name, tensor in get_format(format).encode("x", weight).items():
            assert torch.equal(together[name][e], tensor), name
