"""A tiny model's config, and the checkpoint that a compile of it makes."""

from __future__ import annotations

from pathlib import Path

import pytest
from torch import Tensor
from transformers import LlamaForCausalLM

import awqc
from awqc.inspection.subject import Subject, look_at


@pytest.fixture(scope="session")
def config_only(tiny_llama: LlamaForCausalLM, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model directory without weights."""
    folder = tmp_path_factory.mktemp("config")
    tiny_llama.config.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def checkpoint(
    tiny_llama: LlamaForCausalLM, token_ids: Tensor, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    config = awqc.QuantConfig(group_size=32)
    compiled = awqc.compile(tiny_llama, token_ids, config=config)
    return compiled.save(tmp_path_factory.mktemp("compiled") / "out")


@pytest.fixture(scope="session")
def loaded(checkpoint: Path) -> Subject:
    """The checkpoint on the CPU, one token."""
    return look_at(checkpoint, tokens=1)


@pytest.fixture(scope="session")
def outlined(config_only: Path) -> Subject:
    """The model on an H200 that need not be here, one token."""
    return look_at(config_only, gpu="h200", tokens=1, config=awqc.QuantConfig(group_size=32))
