"""Tiny random models of several architectures."""

from __future__ import annotations

from typing import Any

import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

_SIZES: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.1,
    "bos_token_id": 1,
    "eos_token_id": 0,
}


def llama(**changes: Any) -> LlamaForCausalLM:
    """Width 64, two layers, grouped-query attention."""
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**{**_SIZES, **changes})).eval()


def ragged_llama() -> LlamaForCausalLM:
    """One layer; the down projection reads 96 channels: a group of 64 and one of 32."""
    return llama(intermediate_size=96, num_hidden_layers=1)


def qwen2() -> Qwen2ForCausalLM:
    """Biases on q, k and v."""
    torch.manual_seed(0)
    return Qwen2ForCausalLM(Qwen2Config(**{**_SIZES, "intermediate_size": 96})).eval()


def gpt2() -> GPT2LMHeadModel:
    """Weights stored ``(K, N)``, q, k and v fused, biases everywhere, embeddings tied."""
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=128,
        n_positions=64,
        n_embd=64,
        n_layer=2,
        n_head=4,
        initializer_range=0.1,
        bos_token_id=1,
        eos_token_id=0,
    )
    return GPT2LMHeadModel(config).eval()
