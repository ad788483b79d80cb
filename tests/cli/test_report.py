"""``awqc report``."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

Invoke = Callable[..., Any]


def data(page: Path) -> Any:
    found = re.search(
        r'<script id="data" type="application/json">(.*?)</script>', page.read_text("utf-8"), re.DOTALL
    )
    assert found is not None
    return json.loads(found[1])


def test_a_page_with_the_graph_of_every_layer(checkpoint: Path, invoke: Invoke, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    result = invoke("report", checkpoint, "-o", page, "--title", "a tiny model")
    assert result.exit_code == 0, result.stderr
    assert re.fullmatch(rf"{page} \(0\.\d MB\)\n", result.stdout)
    assert "<h1>a tiny model</h1>" in page.read_text("utf-8")
    written = data(page)
    assert [layer["index"] for layer in written["layers"]] == [-1, 0, 1]
    diff = written["graphs"]["2"]["diff"]
    name = "model.layers.1.mlp.down_proj"
    assert any(
        line.startswith("-") and "aten.linear(mul" in line and f"{name}.weight" in line for line in diff
    )
    assert any(line.startswith("+") and "awqc.qlinear" in line and f"{name}." in line for line in diff)
    assert ["model.layers.1.mlp.up_proj.weight", f"{name}.weight", "mul"] in written["graphs"]["2"]["edges"]


def test_from_a_report_alone(checkpoint: Path, invoke: Invoke, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    result = invoke("report", checkpoint / "awqc_report.json", "-o", page)
    assert result.exit_code == 0, result.stderr
    assert data(page)["graphs"] == {}


def test_a_checkpoint_that_cannot_be_loaded_still_gets_a_page(
    checkpoint: Path, invoke: Invoke, tmp_path: Path
) -> None:
    (tmp_path / "out").mkdir()
    for file in ("awqc_report.json", "config.json"):
        (tmp_path / "out" / file).write_text((checkpoint / file).read_text())
    result = invoke("report", tmp_path / "out", "-o", tmp_path / "page.html")
    assert result.exit_code == 0
    assert result.stderr.startswith("the page shows no graphs: ")
    assert (tmp_path / "page.html").is_file()


def test_what_is_no_checkpoint(model: Path, invoke: Invoke, tmp_path: Path) -> None:
    result = invoke("report", model)
    assert (result.exit_code, result.stderr) == (
        1,
        f"error: {model} has no awqc_report.json: only checkpoints that awqc has written hold one\n",
    )
    result = invoke("report", tmp_path / "none")
    assert (
        result.stderr == f"error: there is no {tmp_path / 'none'}: give a checkpoint directory or a report\n"
    )


def test_a_page_that_cannot_be_written(checkpoint: Path, invoke: Invoke, tmp_path: Path) -> None:
    result = invoke("report", checkpoint, "--no-graph", "-o", tmp_path / "none" / "page.html")
    assert (result.exit_code, result.stderr) == (
        1,
        f"error: {tmp_path / 'none' / 'page.html'} cannot be written: No such file or directory\n",
    )
