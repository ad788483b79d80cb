"""``awqc plan``."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

Invoke = Callable[..., Any]


def test_a_plan_from_config_alone(model: Path, tmp_path: Path, invoke: Invoke) -> None:
    (tmp_path / "config.json").write_text((model / "config.json").read_text())
    result = invoke("plan", tmp_path, "--max-calib-samples", "8", "--max-calib-seq-len", "32")
    assert result.exit_code == 0, result.stderr
    for text in ("8 x 32 = 256 tokens", "Stages", "model.layers.*.mlp.down_proj", "Time", "search-scales"):
        assert text in result.stdout
    assert max(map(len, result.stdout.splitlines())) <= 100


def test_json(model: Path, invoke: Invoke) -> None:
    document = json.loads(invoke("plan", model, "--max-calib-samples", "8", "--json").stdout)
    assert document["samples"] == 8
    assert document["tokens"] == 8 * document["seq_len"]
    assert document["total_seconds"] > 0
    assert set(document["rates"]) >= {"flops", "grams", "read"}
    assert document["report"]["linears"]


def test_what_cannot_be_planned(tmp_path: Path, invoke: Invoke) -> None:
    result = invoke("plan", tmp_path)
    assert result.exit_code == 1
    assert "config" in result.stderr
