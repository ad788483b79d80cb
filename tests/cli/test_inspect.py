"""``awqc inspect``."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import awqc
from awqc.pipeline import Pipeline

Invoke = Callable[..., Any]


@pytest.fixture
def config_only(model: Path, tmp_path: Path) -> Path:
    """A model directory without weights."""
    (tmp_path / "config.json").write_text((model / "config.json").read_text())
    return tmp_path


def test_groups_of_a_model_without_weights(config_only: Path, invoke: Invoke) -> None:
    result = invoke("inspect", config_only)
    assert result.exit_code == 0, result.stderr
    rows = [line.rsplit(maxsplit=4)[0] for line in result.stdout.splitlines() if "layers.*" in line]
    assert [line.split()[0] for line in rows] == [
        "model.layers.*.input_layernorm.weight",
        "model.layers.*.self_attn.v_proj.weight",
        "model.layers.*.post_attention_layernorm.weight",
        "model.layers.*.mlp.up_proj.weight",
    ]
    assert "q_proj, k_proj, v_proj" in result.stdout


def test_groups_as_json_are_those_of_analyze(model: Path, invoke: Invoke) -> None:
    import torch

    document = json.loads(invoke("inspect", model, "--groups", "--json").stdout)
    expected = awqc.analyze(model, torch.arange(16)[None] % 2)
    assert [group["linears"] for group in document["groups"]] == [list(g.linears) for g in expected.groups]
    assert [group["alive"] for group in document["groups"]] == [int(g.alive.sum()) for g in expected.groups]
    assert document["linears"].keys() == expected.linears.keys()
    assert document["linears"]["model.layers.0.mlp.down_proj.weight"] == {
        "group": "model.layers.0.mlp.up_proj.weight"
    }


def test_full_gives_every_group_a_row(model: Path, invoke: Invoke) -> None:
    result = invoke("inspect", model, "--groups", "--full")
    assert "model.layers.0.mlp.up_proj.weight" in result.stdout
    assert "model.layers.1.mlp.up_proj.weight" in result.stdout
    assert "*" not in result.stdout


def test_the_report_of_a_checkpoint_needs_no_option(checkpoint: Path, invoke: Invoke) -> None:
    result = invoke("inspect", checkpoint)
    for title in ("Summary", "Quantized linears", "Linears in float", "Scale groups", "Time", "Notes"):
        assert f"\n{title}" in f"\n{result.stdout}"
    assert invoke("inspect", checkpoint, "--report").stdout == result.stdout
    document = json.loads(invoke("inspect", checkpoint, "--report", "--json").stdout)
    assert document == json.loads((checkpoint / "awqc_report.json").read_text())


def test_a_checkpoint_without_a_report(model: Path, invoke: Invoke) -> None:
    result = invoke("inspect", model, "--report")
    assert (result.exit_code, result.stderr) == (
        1,
        f"error: {model} has no awqc_report.json: only checkpoints that awqc has written hold one\n",
    )


def test_a_damaged_report(tmp_path: Path, invoke: Invoke) -> None:
    file = tmp_path / "awqc_report.json"
    file.write_text('{"linears": {"a": {"size": 3}}}')
    result = invoke("inspect", tmp_path)
    assert result.exit_code == 1
    assert result.stderr.startswith(f"error: {file} is damaged, or of another version of awqc: ")


def test_the_graph_of_a_model_and_the_lowered_one_of_a_checkpoint(
    model: Path, checkpoint: Path, invoke: Invoke
) -> None:
    plain = invoke("inspect", model, "--graph").stdout
    lowered = json.loads(invoke("inspect", checkpoint, "--graph", "--json").stdout)["graph"]
    assert plain.count("aten.linear(") == 15
    assert lowered.count("aten.linear(") == 1
    assert lowered.count("= awqc.") == 14


def test_what_a_pass_does_to_the_graph(config_only: Path, model: Path, invoke: Invoke) -> None:
    canonical = invoke("inspect", config_only, "--diff", "canonicalize").stdout.splitlines()
    removed = [line for line in canonical if line.startswith("-")]
    assert any("_assert_tensor_metadata" in line for line in removed)
    assert not any("_assert_tensor_metadata" in line for line in canonical if line.startswith("+"))
    quantized = json.loads(invoke("inspect", model, "--diff", "quantize-linears", "--json").stdout)["diff"]
    lines = quantized.splitlines()
    assert sum(line.startswith("-") and "aten.linear(" in line for line in lines) == 14
    assert sum(line.startswith("+") and "awqc.qlinear(" in line for line in lines) == 14


def test_a_pass_that_leaves_the_nodes_alone(config_only: Path, invoke: Invoke) -> None:
    result = invoke("inspect", config_only, "--diff", "insert-observers")
    assert result.stdout == "insert-observers leaves the nodes of the graph as they are\n"


def test_a_pass_that_changes_weights(model: Path, invoke: Invoke) -> None:
    result = invoke("inspect", model, "--diff", "clip-weights")
    assert (result.exit_code, result.stderr) == (
        1,
        "error: 'clip-weights' changes weights, not the graph: its effect is in the report\n",
    )


def test_a_pass_that_there_is_not(model: Path, invoke: Invoke) -> None:
    result = invoke("inspect", model, "--diff", "inline")
    names = ", ".join(Pipeline.default().names())
    assert (result.exit_code, result.stderr) == (
        1,
        f"error: no pass is called 'inline': there are {names}\n",
    )


def test_two_things_at_once(model: Path, invoke: Invoke) -> None:
    result = invoke("inspect", model, "--graph", "--groups")
    assert result.exit_code == 2
    assert "give one of --groups, --capture, --report, --graph and --diff" in result.stderr


def test_the_ladder_without_weights(config_only: Path, invoke: Invoke) -> None:
    result = invoke("inspect", config_only, "--capture")
    assert result.exit_code == 0, result.stderr
    lines = result.stdout.splitlines()
    assert lines[0].startswith("captured by torch.export: ")
    assert lines[1] == "there are no weights to run: numbers were not compared with eager execution"
    document = json.loads(invoke("inspect", config_only, "--capture", "--json").stdout)
    assert document["rung"] == "torch.export"
    assert document["notes"] == []


def test_the_ladder_says_what_failed(tmp_path: Path, invoke: Invoke) -> None:
    """A model whose experts are a loop over values; from its config alone."""
    import transformers

    attention = {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 1e4}
    experts = {"ffn_hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2}
    config = transformers.DbrxConfig(
        d_model=32,
        n_heads=2,
        n_layers=1,
        max_seq_len=32,
        vocab_size=64,
        attn_config=attention,
        ffn_config=experts,
    )
    config.architectures = ["DbrxForCausalLM"]
    config.save_pretrained(tmp_path)
    lines = invoke("inspect", tmp_path, "--capture").stdout.splitlines()
    assert lines[0].startswith("- torch.export: DbrxForCausalLM could not be traced by torch.export: ")
    assert lines[1] == "- run as they are: all modules of class DbrxExperts"
    assert lines[2].startswith("captured by torch.export with regions: ")
