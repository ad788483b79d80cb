"""``awqc eval``."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, LlamaForCausalLM

import awqc
from awqc.backend import backends
from awqc.evaluate import compare, perplexity

Invoke = Callable[..., Any]


def test_perplexity_is_that_of_the_library(model: Path, text: Path, invoke: Invoke) -> None:
    found = json.loads(invoke("eval", model, "--text", text, "--window", 64, "--json").stdout)
    original = LlamaForCausalLM.from_pretrained(model, dtype=torch.float32)
    ids = torch.tensor(AutoTokenizer.from_pretrained(model)(text.read_text())["input_ids"])
    expected = perplexity(original, ids, window=64)
    assert found["perplexity"]["value"] == pytest.approx(expected.value, rel=1e-5)
    assert found["perplexity"]["tokens"] == expected.tokens
    assert found["window"] == 64
    assert found["against"] is None
    assert "kl" not in found


def test_against_the_original(model: Path, checkpoint: Path, text: Path, invoke: Invoke) -> None:
    arguments = ("eval", checkpoint, "--text", text, "--against", model, "--window", 64, "--max-tokens", 200)
    found = json.loads(invoke(*arguments, "--json").stdout)
    original = LlamaForCausalLM.from_pretrained(model, dtype=torch.float32)
    ids = torch.tensor(AutoTokenizer.from_pretrained(model)(text.read_text())["input_ids"])[:200]
    expected = compare(awqc.load(checkpoint), original, ids, window=64)
    assert found["kl"] == pytest.approx(expected.kl, rel=1e-4)
    assert found["top1_agreement"] == expected.top1_agreement
    assert found["reference"]["value"] == pytest.approx(expected.reference.value, rel=1e-5)
    assert found["kl"] > 0
    table = invoke(*arguments).stdout
    assert f"{found['perplexity']['value']:.3f}" in table
    assert f"{found['kl']:.4f} nats" in table
    assert f"196 predictions of {text} in windows of 64, " in table


def test_the_backend_is_chosen(checkpoint: Path, text: Path, invoke: Invoke) -> None:
    result = invoke("eval", checkpoint, "--text", text, "--backend", "quantum")
    names = ", ".join(["auto", *backends()])
    assert result.stderr == f"error: unknown backend 'quantum': choose one of {names}\n"
    assert {"cpu", "exllama", "marlin", "reference", "triton"} <= set(backends())
    assert result.exit_code == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--window", "512"],
            "window=512 is longer than the model's limit of 128 tokens: give window=128 or less",
        ),
        (["--dtype", "int8"], "--dtype int8: choose one of float32, float16, bfloat16"),
        (["--max-tokens", "1"], "the text to evaluate has 1 tokens: it takes at least 2"),
    ],
)
def test_bad_options(model: Path, text: Path, invoke: Invoke, arguments: list[str], message: str) -> None:
    result = invoke("eval", model, "--text", text, *arguments)
    assert (result.exit_code, result.stderr, result.stdout) == (1, f"error: {message}\n", "")


def test_a_text_that_is_not_there(model: Path, invoke: Invoke) -> None:
    result = invoke("eval", model, "--text", "nowhere.txt")
    assert (result.exit_code, result.stderr) == (1, "error: nowhere.txt: no such calibration file\n")


def test_a_model_that_is_not_there(text: Path, invoke: Invoke, tmp_path: Path) -> None:
    missing = tmp_path / "missing"
    result = invoke("eval", missing, "--text", text)
    assert (result.exit_code, result.stderr) == (
        1,
        f"error: {missing} is not a directory: give a local Hugging Face model directory, or a module in "
        "memory\n",
    )
