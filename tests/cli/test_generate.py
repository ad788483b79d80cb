"""``awqc generate``."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, GenerationConfig

import awqc
from awqc.cli.models import open_model

Invoke = Callable[..., Any]
PROMPT = "the miller sat"


def test_the_text_is_on_stdout_and_the_rate_on_stderr(checkpoint: Path, invoke: Invoke) -> None:
    result = invoke("generate", checkpoint, "--prompt", PROMPT, "--max-new-tokens", 8)
    assert result.exit_code == 0
    assert result.stdout.startswith(PROMPT)
    assert result.stderr.endswith(" tokens/s\n")


def test_greedy_text_is_that_of_the_library(checkpoint: Path, invoke: Invoke) -> None:
    found = json.loads(invoke("generate", checkpoint, "-p", PROMPT, "-n", 8, "--json").stdout)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    ids = tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    out = awqc.load(checkpoint).generate(ids, max_new_tokens=8, do_sample=False)
    assert found["text"] == tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
    assert found["tokens"] == out.shape[1] - ids.shape[1]
    assert found["tokens_per_second"] == pytest.approx(found["tokens"] / found["seconds"])


def test_sampling_follows_the_seed(model: Path, invoke: Invoke) -> None:
    def text(seed: int) -> str:
        arguments = ("-p", PROMPT, "-n", 16, "--temperature", 1.5, "--top-p", 0.99, "--seed", seed, "--json")
        found: str = json.loads(invoke("generate", model, *arguments).stdout)["text"]
        return found

    assert text(1) == text(1)
    assert text(1) != text(2)


def test_a_checkpoint_keeps_how_its_model_generates(checkpoint: Path, invoke: Invoke, tmp_path: Path) -> None:
    strict = tmp_path / "strict"
    shutil.copytree(checkpoint, strict)
    # No token twice, where random weights repeat themselves at once.
    GenerationConfig(no_repeat_ngram_size=1).save_pretrained(strict)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    ids = tokenizer(PROMPT, return_tensors="pt")["input_ids"]

    def text(**options: Any) -> str:
        out = awqc.load(checkpoint).generate(ids, max_new_tokens=24, do_sample=False, **options)
        return tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)

    found = json.loads(invoke("generate", strict, "-p", PROMPT, "-n", 24, "--json").stdout)
    assert found["text"] == text(no_repeat_ngram_size=1)
    assert found["text"] != text()


def test_a_prompt_in_the_chat_template(model: Path, invoke: Invoke, tmp_path: Path) -> None:
    result = invoke("generate", model, "-p", PROMPT, "--chat")
    assert (result.exit_code, result.stderr) == (
        1,
        "error: --chat: the tokenizer has no chat template: leave --chat out\n",
    )
    chatty = tmp_path / "chatty"
    shutil.copytree(model, chatty)
    tokenizer = AutoTokenizer.from_pretrained(chatty)
    tokenizer.chat_template = "{% for m in messages %}<{{ m['content'] }}>{% endfor %}"
    tokenizer.save_pretrained(chatty)
    chat = json.loads(invoke("generate", chatty, "-p", PROMPT, "--chat", "--json").stdout)
    plain = json.loads(invoke("generate", chatty, "-p", f"<{PROMPT}>", "--json").stdout)
    assert chat["text"] == plain["text"]


def test_more_tokens_than_the_model_takes(model: Path, invoke: Invoke) -> None:
    result = invoke("generate", model, "-p", "a", "-n", 128)
    assert (result.exit_code, result.stderr) == (
        1,
        "error: a prompt of 1 tokens and --max-new-tokens 128 exceed the model's limit of 128 tokens: "
        "shorten one of them\n",
    )


def test_an_empty_prompt(model: Path, invoke: Invoke) -> None:
    result = invoke("generate", model, "-p", "")
    assert (result.exit_code, result.stderr) == (
        1,
        "error: the prompt is empty: give at least one token to continue\n",
    )


def test_another_dtype(model: Path) -> None:
    assert open_model(model).dtype == torch.float32
    assert open_model(model, dtype="bfloat16").dtype == torch.bfloat16
