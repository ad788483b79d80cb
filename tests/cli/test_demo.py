"""``awqc demo``."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from awqc.checkpoints import open_checkpoint
from awqc.cli import demo
from awqc.demo import MODEL_PATH

Invoke = Callable[..., Any]


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("demo") / "checkpoint"


@pytest.fixture(scope="module")
def found(invoke: Invoke, out: Path) -> dict[str, Any]:
    result = invoke("demo", "-o", out, "--json")
    assert result.exit_code == 0, result.stderr
    document: dict[str, Any] = json.loads(result.stdout)
    return document


def test_four_bits_cost_little(found: dict[str, Any]) -> None:
    before, after = found["perplexity"]["before"], found["perplexity"]["after"]
    assert 1 < before < after < 1.03 * before
    assert 0 < found["kl"] < 0.03
    assert found["scheme"] == "W4 g128 asym"


def test_sizes_are_those_on_disk(found: dict[str, Any], out: Path) -> None:
    stored = {"before": MODEL_PATH / "model.safetensors", "after": out / "model.safetensors"}
    assert found["bytes"] == {when: file.stat().st_size for when, file in stored.items()}
    # Linears take 4 bits a weight, and a group of 128 a 16-bit scale and a 4-bit zero point.
    ratio = found["linear_bytes"]["after"] / found["linear_bytes"]["before"]
    assert ratio == pytest.approx((4 + 20 / 128) / 16)


def test_the_checkpoint_is_kept(found: dict[str, Any], out: Path) -> None:
    assert found["path"] == str(out)
    assert len(open_checkpoint(out).quantized_names()) == found["linears"] == 35


def test_both_models_wrote_text(found: dict[str, Any]) -> None:
    for when in ("before", "after"):
        words = found["text"][when]["text"].split()
        assert found["text"][when]["tokens"] == 60
        assert len(words) > 20
        assert len(set(words)) > len(words) / 3


def test_what_is_shown(
    found: dict[str, Any], invoke: Invoke, monkeypatch: pytest.MonkeyPatch, out: Path
) -> None:
    """The page is made from the same document, so the work is not done again."""
    monkeypatch.setattr(demo, "_demo", lambda folder, bars: found)
    page = invoke("demo").stdout
    for when in ("before", "after"):
        assert f"{found['perplexity'][when]:.2f}" in page
        assert found["prompt"] in page
    assert "5.84 MB" in page
    assert "Your own model: awqc compile MODEL --calib TEXT.txt -o OUT" in page
    assert "The checkpoint is in" not in page
    assert f"The checkpoint is in {out}." in invoke("demo", "-o", out).stdout
