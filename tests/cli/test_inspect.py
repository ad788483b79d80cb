"""``awqc inspect``."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import awqc
from awqc.kernels import nvrtc
from awqc.pipeline import Pipeline

Invoke = Callable[..., Any]


@pytest.fixture
def config_only(model: Path, tmp_path: Path) -> Path:
    """A model directory without weights."""
    (tmp_path / "config.json").write_text((model / "config.json").read_text())
    return tmp_path


def test_groups_of_a_model_without_weights(config_only: Path, invoke: Invoke) -> None:
    result = invoke("inspect", config_only, "--groups")
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


def test_the_report_of_a_checkpoint(checkpoint: Path, invoke: Invoke) -> None:
    result = invoke("inspect", checkpoint, "--report")
    for title in ("Summary", "Quantized linears", "Linears in float", "Scale groups", "Time", "Notes"):
        assert f"\n{title}" in f"\n{result.stdout}"
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
    result = invoke("inspect", tmp_path, "--report")
    assert result.exit_code == 1
    assert result.stderr.startswith(f"error: {file} is damaged, or of another version of awqc: ")


def test_the_lowered_graph_is_what_is_shown(config_only: Path, checkpoint: Path, invoke: Invoke) -> None:
    """Of a checkpoint as it is loaded, of a float model as it would be, without weights."""
    for model, what in ((checkpoint, "on cpu"), (config_only, "without values, for cpu")):
        options = ("--group-size", 32, "--tokens", 32)
        result = invoke("inspect", model, *options)
        assert result.exit_code == 0, result.stderr
        assert result.stdout == invoke("inspect", model, "--graph", *options).stdout
        lines = result.stdout.splitlines()
        assert sum(" = awqc.qlinear_llvm(" in line or " = awqc.qlinear_cpu(" in line for line in lines) == 14
        about = [line for line in lines if line.startswith("    # W4 g32 asym; scale of model.layers.")]
        assert len(about) == 14
        assert all("; cpu: aten.linear (bfloat16 copy)" in line for line in about)
        assert any(line.endswith(f", {what}") for line in lines)
        assert "14 quantized linears: 14 W4 g32 asym; run by cpu 14" in lines
        assert "cpu      14  marlin runs on NVIDIA GPUs, not on cpu" in [line.rstrip() for line in lines]
        assert "lm_head  kept: computes the model's output (quantize_head=True quantizes it)" in [
            line.rstrip() for line in lines
        ]


def test_few_tokens_take_another_kernel(checkpoint: Path, invoke: Invoke) -> None:
    result = invoke("inspect", checkpoint, "--tokens", 2)
    kernels = "cpu: dot_products.py:linear", "cpu: aten._weight_int4pack_mm_for_cpu"
    assert sum(map(result.stdout.count, kernels)) == 14


def test_the_graph_as_json(checkpoint: Path, invoke: Invoke) -> None:
    document = json.loads(invoke("inspect", checkpoint, "--graph", "--json").stdout)
    linears = [node["linear"] for node in document["nodes"] if "linear" in node]
    assert len(linears) == 14
    assert linears[0]["refused"]["marlin"] == "runs on NVIDIA GPUs, not on cpu"


def test_the_graph_after_a_pass(config_only: Path, invoke: Invoke) -> None:
    captured = invoke("inspect", config_only, "--after", "captured").stdout
    canonical = invoke("inspect", config_only, "--after", "canonicalize").stdout
    lowered = json.loads(invoke("inspect", config_only, "--after", "lower", "--json").stdout)
    assert captured.count("_assert_tensor_metadata") > canonical.count("_assert_tensor_metadata") == 0
    assert canonical.count("aten.linear(") == 15
    assert lowered["after"] == "lower"
    assert lowered["graph"].count("= awqc.") == 14


def test_what_a_pass_does_to_the_graph(config_only: Path, invoke: Invoke) -> None:
    canonical = invoke("inspect", config_only, "--change", "canonicalize").stdout.splitlines()
    removed = [line for line in canonical if line.startswith("-")]
    assert any("_assert_tensor_metadata" in line for line in removed)
    assert not any("_assert_tensor_metadata" in line for line in canonical if line.startswith("+"))
    quantized = json.loads(invoke("inspect", config_only, "--change", "quantize-linears", "--json").stdout)
    lines = quantized["diff"].splitlines()
    assert quantized["b"] == "quantize-linears"
    assert sum(line.startswith("-") and "aten.linear(" in line for line in lines) == 14
    assert sum(line.startswith("+") and "awqc.qlinear(" in line for line in lines) == 14


def test_from_one_pass_to_another(config_only: Path, invoke: Invoke) -> None:
    result = invoke("inspect", config_only, "--diff", "canonicalize", "lower")
    assert result.exit_code == 0, result.stderr
    lines = result.stdout.splitlines()
    assert sum(line.startswith("-") and "aten.linear(" in line for line in lines) == 14
    assert sum(line.startswith("+") and ".packed, " in line for line in lines) == 14


def test_a_pass_that_leaves_the_nodes_alone(config_only: Path, invoke: Invoke) -> None:
    result = invoke("inspect", config_only, "--change", "insert-observers")
    assert result.stdout == "the graph after insert-observers is the graph after find-scale-groups\n"


def test_a_pass_that_changes_weights(config_only: Path, invoke: Invoke) -> None:
    for options in (("--change", "clip-weights"), ("--diff", "lower", "clip-weights")):
        result = invoke("inspect", config_only, *options)
        assert (result.exit_code, result.stderr) == (
            1,
            "error: 'clip-weights' changes weights, not the graph: its effect is in the report\n",
        )


def test_a_pass_that_there_is_not(config_only: Path, invoke: Invoke) -> None:
    names = ", ".join(["captured", *Pipeline.default().names()])
    for options in (("--after", "inline"), ("--change", "inline"), ("--diff", "lower", "inline")):
        result = invoke("inspect", config_only, *options)
        assert (result.exit_code, result.stderr) == (
            1,
            f"error: no pass is called 'inline': there are {names}\n",
        )


def test_the_passes_of_a_checkpoint_ran_before(checkpoint: Path, invoke: Invoke) -> None:
    result = invoke("inspect", checkpoint, "--after", "lower")
    assert (result.exit_code, result.stderr) == (
        1,
        f"error: {checkpoint} is quantized already: its passes ran on the float model; give that\n",
    )


def test_a_linear_from_its_statistics_to_its_kernel(checkpoint: Path, invoke: Invoke) -> None:
    name = "model.layers.0.mlp.down_proj"
    result = invoke("inspect", checkpoint, "--linear", name)
    assert result.exit_code == 0, result.stderr
    lines = [line.rstrip() for line in result.stdout.splitlines()]
    assert lines[0] == name
    report = json.loads((checkpoint / "awqc_report.json").read_text())
    row = report["linears"][f"{name}.weight"]
    labels = ("rounded to nearest", "after its", "after clip", "after round")
    for label, (_, error) in zip(labels, row["steps"], strict=True):
        assert any(line.startswith(label) and f"{error:.3e}" in line for line in lines)
    group = report["groups"][row["group"]]
    bars = [line for line in lines if "█" in line]
    assert len(bars) == len(group["curve"]) > 2
    assert sum(line.endswith("◂ chosen") for line in bars) == int(group["applied"])
    assert "cpu        takes it" in lines
    document = json.loads(invoke("inspect", checkpoint, "--linear", name, "--json").stdout)
    assert document["linear"] == row
    assert document["backends"]["marlin"] == "runs on NVIDIA GPUs, not on cpu"


def test_a_linear_that_there_is_not(checkpoint: Path, invoke: Invoke) -> None:
    result = invoke("inspect", checkpoint, "--linear", "layers.0.mlp.down_proj")
    assert result.exit_code == 1
    assert result.stderr.startswith(
        "error: the report has no linear 'layers.0.mlp.down_proj': did you mean model.layers.0.mlp.down_proj"
    )


def test_where_the_time_goes(config_only: Path, invoke: Invoke) -> None:
    options = ("--kernels", "--on", "h200", "--group-size", 32)
    result = invoke("inspect", config_only, *options)
    assert result.exit_code == 0, result.stderr
    lines = [line.rstrip() for line in result.stdout.splitlines()]
    assert any(line.startswith("mlp.down_proj") and "marlin_small.cu:small" in line for line in lines)
    assert any(line.startswith("self_attn.q_proj, k_proj, v_proj ") for line in lines)
    assert any(line.startswith("all ") and line.endswith("100%") for line in lines)
    assert lines[-1].startswith("at the floor: ")
    document = json.loads(invoke("inspect", config_only, *options, "--json").stdout)
    assert document["total"]["bytes"] == sum(stage["bytes"] for stage in document["stages"])
    assert document["total"]["floor"] == pytest.approx(sum(node["floor"] for node in document["nodes"]))
    assert document["rates"]["read"] == 4.8e12


def test_kernels_measured_here(checkpoint: Path, invoke: Invoke, monkeypatch: pytest.MonkeyPatch) -> None:
    from awqc.inspection import timing

    monkeypatch.setattr(timing, "_BUDGET", 0.0)
    monkeypatch.setattr(timing, "ROTATED", 1 << 20)
    result = invoke("inspect", checkpoint, "--kernels", "--measure")
    assert result.exit_code == 0, result.stderr
    assert "as measured, node by node: " in result.stdout
    assert "a streaming read on this cpu device reaches " in result.stdout
    document = json.loads(invoke("inspect", checkpoint, "--kernels", "--measure", "--json").stdout)
    assert all(node["seconds"] > 0 for node in document["nodes"])


@pytest.mark.skipif(not nvrtc.available(), reason="needs NVRTC (pip install nvidia-cuda-nvrtc)")
def test_code_of_a_kernel(config_only: Path, invoke: Invoke, tmp_path: Path) -> None:
    name, file = "model.layers.0.mlp.down_proj", tmp_path / "down.ptx"
    options = (config_only, "--ptx", name, "--on", "h200", "--group-size", 32)
    text = invoke("inspect", *options).stdout
    assert ".target sm_90a" in text
    result = invoke("inspect", *options, "-o", file)
    assert result.stdout == f"{file} ({len(text.splitlines()):,} lines of ptx for nvidia_h200)\n"
    assert file.read_text() == text
    assert json.loads(invoke("inspect", *options, "--json").stdout)["code"] == text


def test_plots(checkpoint: Path, invoke: Invoke, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    from awqc.inspection import timing

    monkeypatch.setattr(timing, "_BUDGET", 0.0)
    monkeypatch.setattr(timing, "ROTATED", 1 << 20)
    result = invoke("inspect", checkpoint, "--plot", tmp_path / "plots")
    assert result.exit_code == 0, result.stderr
    names = ["loss_over_ratio", "error_by_layer", "bandwidth_by_shape"]
    assert result.stdout.split() == [str(tmp_path / "plots" / f"{name}.png") for name in names]
    assert all((tmp_path / "plots" / f"{name}.png").read_bytes()[:4] == b"\x89PNG" for name in names)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--on", "h300"), "nothing is known of a GPU 'h300': there are "),
        (("--kernels", "--measure", "--on", "h200"), "--measure: nvidia_h200 is not here; "),
        (("--ptx", "nothing"), "no node and no quantized linear is called 'nothing'"),
        (
            ("--sass", "silu", "--on", "h200"),
            "'silu' runs aten.silu on nvidia_h200, which is no GPU code of ",
        ),
        (("--backend", "fast"), "unknown backend 'fast': choose one of auto, "),
        (("--bits", 9), "bits=9: awqc quantizes to 2, 3, 4, 5, 6, 7 or 8 bits"),
    ],
)
def test_bad_input_gets_one_line(config_only: Path, invoke: Invoke, options: Any, message: str) -> None:
    result = invoke("inspect", config_only, *options)
    assert result.exit_code == 1
    assert result.stderr.startswith(f"error: {message}")
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize("view", ["--graph", "--kernels", "--groups", "--capture", "--report"])
def test_what_is_no_model(tmp_path: Path, invoke: Invoke, view: str) -> None:
    for path, message in (
        (tmp_path / "none", "is not a directory: give a model directory or a quantized checkpoint"),
        (tmp_path, "has no "),
    ):
        result = invoke("inspect", path, view)
        assert result.exit_code == 1
        assert result.stderr.startswith(f"error: {path} {message}")
        assert result.stderr.count("\n") == 1


def test_two_things_at_once(model: Path, invoke: Invoke) -> None:
    result = invoke("inspect", model, "--graph", "--groups")
    assert result.exit_code == 2
    assert "give one of --graph, " in result.stderr


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
