"""``awqc compile``."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import awqc
from awqc.checkpoints import open_checkpoint
from awqc.cli.compile import compile as command
from awqc.config import QuantConfig

Invoke = Callable[..., Any]
LINEARS = 2 * 7


def test_writes_a_checkpoint_and_says_what_was_done(
    model: Path, options: list[Any], invoke: Invoke, tmp_path: Path
) -> None:
    result = invoke("compile", model, *options, "-o", tmp_path / "out")
    assert result.exit_code == 0
    assert result.stderr == ""
    assert f"linears           {LINEARS} W4 g32 asym, 1 kept" in result.stdout
    assert "calibration       4 x 32 = 128 tokens of " in result.stdout
    assert "model.layers.*.mlp.up_proj" in result.stdout
    assert f"{tmp_path / 'out'} (awq, " in result.stdout
    assert len(open_checkpoint(tmp_path / "out").quantized_names()) == LINEARS


def test_json_is_the_only_thing_on_stdout_and_holds_the_report(
    model: Path, options: list[Any], invoke: Invoke, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    arguments = [
        "--format",
        "awqc",
        "--bits",
        3,
        "--symmetric",
        "--keep",
        "*.down_proj",
        "--keep",
        "*.k_proj",
    ]
    result = invoke("compile", model, *options, *arguments, "-o", out, "--json")
    document = json.loads(result.stdout)
    assert document["path"] == str(out)
    assert document["format"] == "awqc"
    decisions = {
        row["name"]: (row["decision"], row["scheme"]) for row in document["report"]["linears"].values()
    }
    assert decisions["model.layers.1.mlp.up_proj"] == ("quantized", "W3 g32 sym")
    assert decisions["model.layers.1.mlp.down_proj"] == ("kept", "")
    assert decisions["model.layers.0.self_attn.k_proj"] == ("kept", "")
    assert document["report"] == json.loads((out / "awqc_report.json").read_text())


def test_the_options_reach_the_compile(model: Path, text: Path, invoke: Invoke, tmp_path: Path) -> None:
    result = invoke(
        *("compile", model, "--calib", text, "-o", tmp_path / "out", "--json", "--backend", "reference"),
        *(
            "--bits",
            8,
            "--group-size",
            16,
            "--propagate",
            "float",
            "--quantize-head",
            "--seed",
            3,
            "--require-coverage",
            0.5,
        ),
        *("--min-expert-tokens", 64, "--calibrate-all-experts"),
        *("--max-calib-samples", 2, "--max-calib-seq-len", 24, "--format", "awqc"),
    )
    report = json.loads(result.stdout)["report"]
    expected = QuantConfig(
        bits=8,
        group_size=16,
        propagate="float",
        min_expert_tokens=64,
        calibrate_all_experts=True,
        quantize_head=True,
        require_coverage=0.5,
        seed=3,
    )
    assert report["config"] == {**expected.as_dict(), "keep": []}
    assert (report["calibration"]["samples"], report["calibration"]["seq_len"]) == (2, 24)
    assert report["linears"]["lm_head.weight"]["decision"] == "quantized"
    assert {row["backend"] for row in report["linears"].values()} == {"reference"}


def test_defaults_are_those_of_the_library() -> None:
    options = inspect.signature(command).parameters
    config = QuantConfig()
    for name in (
        "bits",
        "group_size",
        "zero_point",
        "quantize_head",
        "propagate",
        "min_expert_tokens",
        "calibrate_all_experts",
        "input_scales",
        "require_coverage",
        "seed",
    ):
        assert options[name].default == getattr(config, name)
    library = inspect.signature(awqc.compile).parameters
    for name in ("calib", "backend", "max_calib_samples", "max_calib_seq_len", "split", "column", "device"):
        assert options[name].default == library[name].default
    assert (
        options["format"].default == inspect.signature(awqc.CompiledModel.save).parameters["format"].default
    )


def test_passes_are_inserted_replaced_and_left_out(
    model: Path, options: list[Any], invoke: Invoke, tmp_path: Path
) -> None:
    result = invoke(
        *("compile", model, *options, "-o", tmp_path / "out", "--json"),
        *("--without", "clip-weights", "--without", "search-scales", "--without", "fold-scales"),
        *("--replace", 'round-weights=round-weights(method="nearest")'),
    )
    report = json.loads(result.stdout)["report"]
    assert {row["rounding"] for row in report["linears"].values()} == {"nearest", ""}
    assert not {"clip-weights", "search-scales", "fold-scales"} & set(report["seconds"])
    for row in report["linears"].values():
        # Nothing but rounding to nearest was done, so nothing was gained.
        assert row["error"] is None or row["error"] == pytest.approx(row["nearest_error"], rel=1e-5)


def test_an_existing_checkpoint_is_replaced_only_when_asked(
    model: Path, options: list[Any], invoke: Invoke, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "config.json").write_text("{}")
    result = invoke("compile", model, *options, "-o", out)
    assert result.exit_code == 1
    assert result.stderr == (
        f"error: {out} already exists and is not empty: choose another output path, or pass overwrite=True "
        "(--overwrite) to replace it\n"
    )
    assert invoke("compile", model, *options, "-o", out, "--overwrite").exit_code == 0
    assert open_checkpoint(out).format == "awq"


def _unreached(*_: Any, **__: Any) -> Any:
    raise AssertionError("the compile has started")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--bits", "3"],
            "format 'awq' cannot store 'a W3 g128 asym linear': its codes have 3 bits and those of AWQ files "
            "have 4: keep it in 16 bits, or save as 'awqc'",
        ),
        (
            ["--format", "gguf"],
            "unknown checkpoint format 'gguf': choose one of awq, awqc, compressed-tensors",
        ),
        (["--bits", "9"], "bits=9: awqc quantizes to 2, 3, 4, 5, 6, 7 or 8 bits"),
        (
            ["--input-scales"],
            "format 'awq' cannot store input scales, which are applied at run time: save as 'awqc', or "
            "compile without input_scales",
        ),
        (["--require-coverage", 90], "require_coverage=90.0: give a share between 0 and 1"),
        (["--propagate", "both"], "propagate='both': choose 'quantized' or 'float'"),
        (
            ["--without", "search-scales"],
            "'fold-scales' requires Scales, which no pass of this pipeline provides",
        ),
    ],
)
def test_what_can_be_refused_is_refused_before_the_compile(
    model: Path,
    invoke: Invoke,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.setattr("awqc.job.open_source", _unreached)
    result = invoke("compile", model, *arguments, "-o", tmp_path / "out")
    assert result.stderr == f"error: {message}\n"
    assert result.exit_code == 1
    assert list(tmp_path.iterdir()) == []


def test_the_model_itself_is_no_output_path(model: Path, invoke: Invoke) -> None:
    result = invoke("compile", model, "-o", model, "--overwrite")
    assert result.stderr == f"error: {model} is the model itself: choose another output path\n"
    assert (model / "model.safetensors").is_file()


def test_a_device_that_is_not_there(model: Path, invoke: Invoke, tmp_path: Path) -> None:
    result = invoke("compile", model, "-o", tmp_path / "out", "--device", "nonsense")
    assert result.exit_code == 1
    assert result.stderr.startswith("error: --device nonsense: torch cannot use it here (")
    assert result.stderr.endswith("): try --device cpu\n")


def test_a_linear_that_the_format_cannot_store_is_found_before_the_search(
    model: Path,
    options: list[Any],
    invoke: Invoke,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("awqc.passes.search_scales.SearchScales.run", _unreached)
    result = invoke("compile", model, *options, "--quantize-head", "-o", tmp_path / "out")
    assert result.stderr == (
        "error: format 'awq' cannot store the output head 'lm_head' quantized, since transformers would "
        "leave it with random weights: keep it in 16 bits, or save as 'compressed-tensors' or 'awqc'\n"
    )
    assert list(tmp_path.iterdir()) == []


def test_a_result_that_the_format_turns_out_not_to_carry_is_kept_in_another(
    model: Path, options: list[Any], invoke: Invoke, tmp_path: Path
) -> None:
    pass_file, out = tmp_path / "wider.py", tmp_path / "out"
    pass_file.write_text(
        "from dataclasses import dataclass\n"
        "import awqc\n"
        "from awqc.quantization.schemes import Schemes\n"
        "@dataclass(frozen=True)\n"
        "class Wider(awqc.Pass):\n"
        "    name = 'wider'\n"
        "    scope = 'stage'\n"
        "    bits: int = 8\n"
        "    def run(self, graph, context):\n"
        "        schemes = graph.facts[Schemes]\n"
        "        schemes.update(dict.fromkeys(schemes, awqc.Scheme(self.bits, 32)))\n"
    )
    result = invoke(
        "compile", model, *options, "-o", out, "--before", f"search-scales={pass_file}:Wider(bits=6)"
    )
    assert result.exit_code == 1
    assert result.stderr == (
        "error: format 'awq' cannot store 'model.layers.0.self_attn.q_proj' and 13 more: its codes have 6 "
        "bits and those of AWQ files have 4: keep it in 16 bits, or save as 'awqc'. Nothing is lost: the "
        f"result is in {out} in format 'awqc', from which awqc.load(...).save(..., format=...) writes "
        "another\n"
    )
    loaded = awqc.load(out)
    assert {linear.scheme for linear in loaded.quantized_linears().values()} == {awqc.Scheme(6, 32)}
    assert torch.isfinite(loaded(input_ids=torch.arange(8)[None]).logits).all()


def test_an_interrupted_compile_is_continued_by_the_same_command(
    model: Path, options: list[Any], invoke: Invoke, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import awqc.journal.journal
    from awqc.journal.entry import write_entry

    def stop(directory: Path, number: int, *rest: Any) -> Any:
        if number == 3:
            raise KeyboardInterrupt
        return write_entry(directory, number, *rest)

    command = ("compile", model, *options, "-o", tmp_path / "out", "--max-memory", "1GB")
    with monkeypatch.context() as patch:
        patch.setattr(awqc.journal.journal, "write_entry", stop)
        result = invoke(*command)
    assert result.exit_code == 130, result.stderr
    assert result.stderr == (
        f"interrupted: finished stages are in {tmp_path / 'out'}.journal; the same command continues from "
        "there\n"
    )
    result = invoke(*command)
    assert result.exit_code == 0
    assert "continued after 3 finished stages" in result.stdout
    assert not (tmp_path / "out.journal").exists()


@pytest.mark.parametrize("sizes", ["ten", "cpu=", "=1GB"])
def test_sizes_that_are_none(model: Path, invoke: Invoke, tmp_path: Path, sizes: str) -> None:
    result = invoke("compile", model, "-o", tmp_path / "out", "--max-memory", sizes)
    assert result.exit_code == 1
    assert result.stderr.startswith(("error: max_memory='ten': give bytes", "error: --max-memory: "))
    assert list(tmp_path.iterdir()) == []
