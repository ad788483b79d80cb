"""Tiny compiled models of several architectures, and greedy decoding in ONNX Runtime."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

import awqc
from awqc.export.check import run, session
from awqc.export.decoder import Interface
from awqc.export.onnx import MODEL_FILE

_SIZES: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "initializer_range": 0.1,
    "bos_token_id": 1,
    "eos_token_id": 0,
}


def qwen2() -> Qwen2ForCausalLM:
    """Biases on q, k and v."""
    torch.manual_seed(0)
    return Qwen2ForCausalLM(Qwen2Config(**_SIZES)).eval()


def gemma3() -> Gemma3ForCausalLM:
    """A sliding window of 8 tokens in one of two layers, norms of q and k, ``1 + w``, tied head."""
    torch.manual_seed(0)
    layers = ["sliding_attention", "full_attention"]
    return Gemma3ForCausalLM(Gemma3TextConfig(**_SIZES, sliding_window=8, layer_types=layers)).eval()


def mixtral() -> MixtralForCausalLM:
    """Four experts, two for each token."""
    torch.manual_seed(0)
    return MixtralForCausalLM(MixtralConfig(**_SIZES, num_local_experts=4, num_experts_per_tok=2)).eval()


def compiled(model: nn.Module, **config: Any) -> Any:
    """``model`` quantized in groups of 32, on 8 x 16 random tokens."""
    ids = torch.randint(2, 128, (8, 16), generator=torch.Generator().manual_seed(1))
    settings = awqc.QuantConfig(**{"group_size": 32, **config})
    return awqc.compile(model, ids, backend="reference", config=settings)


def greedy(path: Path, interface: Interface, ids: Tensor, count: int) -> list[int]:
    """``count`` tokens after ``ids`` ``(1, n)``, each from the keys and values of those before."""
    runtime = session(path / MODEL_FILE)
    tokens: list[int] = []
    logits, *past = run(runtime, interface.feed(ids))
    while len(tokens) < count:
        tokens.append(int(logits[0, -1].argmax()))
        logits, *past = run(runtime, interface.feed(torch.tensor([tokens[-1:]]), past))
    return tokens
