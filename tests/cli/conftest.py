"""A tiny random model with a tokenizer of its own, a text, and the checkpoint that ``awqc compile`` makes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from typer.testing import CliRunner

from awqc.cli.main import app

TEXT = "the miller sat by the river and counted the sacks of corn that the boats had left there. " * 40
Invoke = Callable[..., Any]


@pytest.fixture(scope="session")
def invoke() -> Invoke:
    """Run ``awqc`` in this process; paths among the arguments are made strings."""

    def run(*arguments: Any) -> Any:
        return CliRunner().invoke(app, [str(argument) for argument in arguments])

    return run


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("text") / "story.txt"
    file.write_text(TEXT, encoding="utf-8")
    return file


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of two layers, hidden 64, context 128."""
    folder = tmp_path_factory.mktemp("llama")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=["<eos>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>").save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=320,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=128,
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=0,
    )
    LlamaForCausalLM(config).to(torch.float16).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def options(text: Path) -> list[Any]:
    """Of a compile that is quick."""
    return ["--calib", text, "--group-size", 32, "--max-calib-samples", 4, "--max-calib-seq-len", 32]


@pytest.fixture(scope="session")
def checkpoint(
    model: Path, options: list[Any], invoke: Invoke, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    out = tmp_path_factory.mktemp("compiled") / "out"
    result = invoke("compile", model, *options, "-o", out)
    assert result.exit_code == 0, result.stderr
    return out
