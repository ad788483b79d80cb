"""Small random models, saved as dense float32 checkpoints, whose greedy choices are clear of ties."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, Qwen2Config, Qwen2ForCausalLM

# Every width is a multiple of 32, which vLLM's CPU kernel asks for; heads that share keys and values.
SHAPE = dict(
    vocab_size=512,
    hidden_size=128,
    intermediate_size=256,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=256,
    # Larger than usual: logits of a few units, so that the best is clear of the second.
    initializer_range=0.08,
)


def llama(out: Path) -> Path:
    """A llama with a head of its own, in ``out``."""
    torch.manual_seed(0)
    return _save(LlamaForCausalLM(LlamaConfig(**SHAPE, tie_word_embeddings=False)), out)


def qwen2(out: Path) -> Path:
    """A qwen2, that is with biases in q, k and v, and a head tied to the embedding, in ``out``."""
    torch.manual_seed(1)
    return _save(Qwen2ForCausalLM(Qwen2Config(**SHAPE, tie_word_embeddings=True)), out)


def prompts(count: int = 24, length: int = 48) -> list[list[int]]:
    """Random token ids."""
    generator = torch.Generator().manual_seed(2)
    return torch.randint(SHAPE["vocab_size"], (count, length), generator=generator).tolist()


def _save(model: PreTrainedModel, out: Path) -> Path:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.2)  # transformers starts them at zero, which would hide a lost one
    model.save_pretrained(out)
    return out
