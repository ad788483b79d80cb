"""The example of a custom pass, from Python and from the command line."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest
import torch
from typer.testing import CliRunner

import awqc
from awqc.cli.main import app
from awqc.demo import CALIBRATION_TEXT, MODEL_PATH
from awqc.report import LinearRow

EXAMPLE = Path(__file__).parents[2] / "examples" / "keep_sensitive.py"
THRESHOLD = 0.008
FEW = {"max_calib_samples": 2, "max_calib_seq_len": 128}


@pytest.fixture(scope="module")
def example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("keep_sensitive", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def bits(report: awqc.Report) -> dict[str, int]:
    return {row.name: int(row.scheme[1]) for row in report.quantized()}


def test_it_is_short() -> None:
    assert len(EXAMPLE.read_text().splitlines()) <= 60


def test_sensitive_linears_get_8_bits_and_others_keep_4(example: ModuleType) -> None:
    """Scales are left out, so that the pass sees the weights that the report measured."""
    pipeline = awqc.Pipeline.default().remove("search-scales").remove("fold-scales")
    pipeline = pipeline.insert_before("clip-weights", example.KeepSensitive(threshold=THRESHOLD))
    model = awqc.compile(MODEL_PATH, CALIBRATION_TEXT, pipeline=pipeline, **FEW)

    def near(row: LinearRow) -> bool:
        # The report's error is over held-out tokens, the pass's over those of the search.
        assert row.nearest_error is not None
        return THRESHOLD / 1.5 < row.nearest_error < THRESHOLD * 1.5

    rows = list(model.report.quantized())
    found = bits(model.report)
    assert set(found.values()) == {4, 8}
    for row in rows:
        if not near(row):
            assert found[row.name] == (8 if row.nearest_error > THRESHOLD else 4), row
        assert row.error is not None
        assert ("sensitive: 8 bits" in row.notes) == (found[row.name] == 8) == (row.error < 1e-3)
    linears = model.quantized_linears()
    assert {name: linear.scheme.bits for name, linear in linears.items()} == found


@pytest.mark.parametrize(("threshold", "width"), [(0.0, 6), (1.0, 4)])
def test_thresholds_that_take_all_or_none(example: ModuleType, threshold: float, width: int) -> None:
    pipeline = awqc.Pipeline.default().remove("search-scales").remove("fold-scales")
    pipeline = pipeline.insert_before("clip-weights", example.KeepSensitive(threshold, bits=6))
    model = awqc.compile(MODEL_PATH, CALIBRATION_TEXT, pipeline=pipeline, **FEW)
    assert set(bits(model.report).values()) == {width}


@pytest.mark.parametrize("format", ["compressed-tensors", "awqc"])
def test_from_the_command_line_to_a_checkpoint_that_loads(tmp_path: Path, format: str) -> None:
    out = tmp_path / "mixed"
    place = f"clip-weights={EXAMPLE}:KeepSensitive(threshold={THRESHOLD})"
    arguments = ["--max-calib-samples", "2", "--max-calib-seq-len", "128", "--format", format]
    result = CliRunner().invoke(
        app,
        [
            *("compile", str(MODEL_PATH), "--calib", str(CALIBRATION_TEXT), "-o", str(out)),
            *(*arguments, "--before", place, "--json"),
        ],
    )
    assert result.exit_code == 0, result.stderr
    document = json.loads(result.stdout)
    expected = {
        row["name"]: int(row["scheme"][1])
        for row in document["report"]["linears"].values()
        if row["decision"] == "quantized"
    }
    assert set(expected.values()) == {4, 8}
    loaded = awqc.load(out)
    assert {name: linear.scheme.bits for name, linear in loaded.quantized_linears().items()} == expected
    assert torch.isfinite(loaded(input_ids=torch.arange(16)[None]).logits).all()


def test_main_prints_the_linears(
    example: ModuleType, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    example.main()
    printed = capsys.readouterr().out
    assert "W4 g128 asym" in printed
    assert "W8 g128 asym" in printed
