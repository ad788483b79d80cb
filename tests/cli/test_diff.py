"""``awqc diff``."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Invoke = Callable[..., Any]


@pytest.fixture(scope="session")
def other(model: Path, options: list[Any], invoke: Invoke, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model in 3 bits."""
    out = tmp_path_factory.mktemp("other") / "out"
    result = invoke("compile", model, *options, "--bits", 3, "--format", "awqc", "-o", out)
    assert result.exit_code == 0, result.stderr
    return out


def test_two_checkpoints(checkpoint: Path, other: Path, invoke: Invoke) -> None:
    result = invoke("diff", checkpoint, other)
    assert result.exit_code == 0, result.stderr
    lines = result.stdout.splitlines()
    assert "14 of 15 linears differ" in result.stdout
    assert [line.split() for line in lines if line.startswith("bits")] == [["bits", "4", "3"]]
    (all_of,) = [line for line in lines if line.startswith("scheme where it differs")]
    assert "W4 g32 asym" in all_of
    assert "W3 g32 asym" in all_of
    assert sum(line.startswith("model.layers.*.") for line in lines) == 7


def test_every_linear_has_a_row(checkpoint: Path, other: Path, invoke: Invoke) -> None:
    document = json.loads(invoke("diff", checkpoint, other, "--json", "--weights").stdout)
    assert document["same"] == 1
    assert len(document["linears"]) == 14
    reports = [json.loads((side / "awqc_report.json").read_text()) for side in (checkpoint, other)]
    for one in document["linears"]:
        rows = [report["linears"][f"{one['name']}.weight"] for report in reports]
        assert [one["a"]["error"], one["b"]["error"]] == [row["error"] for row in rows]
        assert one["a"]["bytes"] > one["b"]["bytes"]
        assert 0 < one["weights"] < 1
    full = invoke("diff", checkpoint, other, "--full", "--weights").stdout
    assert sum(line.startswith("model.layers.1") for line in full.splitlines()) == 7


def test_nothing_differs(checkpoint: Path, invoke: Invoke) -> None:
    result = invoke("diff", checkpoint, checkpoint, "--weights")
    assert result.exit_code == 0, result.stderr
    assert "0 of 15 linears differ" in result.stdout
    assert "model.layers" not in result.stdout


def test_a_checkpoint_and_its_own_report(checkpoint: Path, invoke: Invoke) -> None:
    """They differ in nothing but what the files of the format hold beyond the weights."""
    document = json.loads(invoke("diff", checkpoint, checkpoint / "awqc_report.json", "--json").stdout)
    assert {field for one in document["linears"] for field in one["differs"]} <= {"bytes"}


def test_bad_input_is_one_line(checkpoint: Path, model: Path, invoke: Invoke, tmp_path: Path) -> None:
    for wrong, message in (
        (model, f"{model} holds neither a quantized checkpoint nor awqc_report.json"),
        (tmp_path / "none", f"there is no {tmp_path / 'none'}: give a checkpoint directory or a report"),
    ):
        result = invoke("diff", checkpoint, wrong)
        assert (result.exit_code, result.stderr) == (1, f"error: {message}\n")
    result = invoke("diff", checkpoint, checkpoint / "awqc_report.json", "--weights")
    assert result.stderr == "error: --weights: there is no linear that both A and B store quantized\n"
