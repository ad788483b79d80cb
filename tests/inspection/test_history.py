"""One linear's history."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from awqc.errors import ConfigError
from awqc.inspection.history import history
from awqc.inspection.outline import find_hardware
from awqc.page.sources import read_report
from awqc.report import Report

NAME = "model.layers.1.mlp.down_proj"


@pytest.fixture(scope="module")
def report(checkpoint: Path) -> Report:
    return read_report(checkpoint)


def test_everything_is_there(report: Report) -> None:
    found = history(report, NAME, find_hardware(None))
    assert [name for name, _ in found.row.steps] == [
        "nearest",
        "fold-scales",
        "clip-weights",
        "round-weights",
    ]
    assert found.row.steps[0][1] == found.row.nearest_error
    assert found.row.steps[-1][1] == found.row.error
    # Clipping and rounding are kept where they help, on the tokens that errors are stated of.
    clipping = [error for _, error in found.row.steps][1:]
    assert clipping == sorted(clipping, reverse=True)
    assert found.row.input["tokens"] == 14 * 16
    assert found.row.input["largest"] >= found.row.input["median"] > 0
    assert found.group is not None
    assert found.group.name == "model.layers.1.mlp.up_proj.weight"
    assert (found.group.scale_range is not None) == found.group.applied


def test_backends_say_why(report: Report) -> None:
    here = history(report, NAME, find_hardware(None)).backends
    assert here["cpu"] is None
    assert here["marlin"] == "runs on NVIDIA GPUs, not on cpu"
    there = history(report, NAME, find_hardware("h200")).backends
    assert there["marlin"] is None
    assert next(iter(there)) == "marlin"


def test_the_kernel_for_so_many_tokens(report: Report) -> None:
    (few,), (many,) = (history(report, NAME, find_hardware(None), m).launches for m in (1, 17))
    assert few.kernel in ("dot_products.py:linear", "aten._weight_int4pack_mm_for_cpu")
    assert many.kernel == "aten.linear (bfloat16 copy)"
    (gpu,) = history(report, NAME, find_hardware("h200")).launches
    assert gpu.kernel == "marlin_small.cu:small"


def test_a_linear_in_float(report: Report) -> None:
    found = history(report, "lm_head", find_hardware(None))
    assert (found.row.decision, found.backends, found.row.steps) == ("kept", {}, [])


def test_as_json(report: Report) -> None:
    found = json.loads(json.dumps(history(report, NAME, find_hardware(None)).as_dict()))
    assert found["linear"]["name"] == NAME
    assert found["group"]["curve"][0] == ["identity", 0.0, 1.0]


def test_a_linear_that_there_is_not(report: Report) -> None:
    with pytest.raises(ConfigError, match=rf"no linear 'layers.1.mlp.down_proj': did you mean {NAME}"):
        history(report, "layers.1.mlp.down_proj", find_hardware(None))


def test_a_report_survives_its_file(report: Report) -> None:
    again = Report.from_json(report.to_json())
    assert again == report
