"""Tiny random models of the architectures that awqc promises to understand.

Two layers of width 64, grouped-query attention where the family has it. Weights are drawn large enough for
every branch to matter, and norms and biases are not left at one and zero.
"""

from typing import Any

import torch
import transformers
from torch import Tensor, nn

VOCABULARY, TOKENS = 96, 12
HEAD, LAYERS = 16, 2

_BASE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "max_position_embeddings": 32,
    "initializer_range": 0.1,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_WIDE = {**_BASE, "intermediate_size": 96}
_GROUPED = {**_WIDE, "num_key_value_heads": 2}
_GEMMA = {**_GROUPED, "head_dim": HEAD, "query_pre_attn_scalar": HEAD, "sliding_window": 8}

#: Name -> the class of its config and its arguments.
ZOO: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", _GROUPED),
    "mistral": ("MistralConfig", _GROUPED),
    "granite": ("GraniteConfig", _GROUPED),
    "smollm3": ("SmolLM3Config", _GROUPED),
    "qwen2": ("Qwen2Config", _GROUPED),
    "qwen3": ("Qwen3Config", {**_GROUPED, "head_dim": HEAD}),
    "gemma2": ("Gemma2Config", _GEMMA),
    "gemma3": ("Gemma3TextConfig", _GEMMA),
    "stablelm": ("StableLmConfig", {**_GROUPED, "use_qkv_bias": True}),
    "olmo2": ("Olmo2Config", _GROUPED),
    "cohere": ("CohereConfig", _GROUPED),
    "phi3": ("Phi3Config", _GROUPED),
    "nemotron": ("NemotronConfig", _GROUPED),
    "starcoder2": ("Starcoder2Config", _GROUPED),
    "opt": ("OPTConfig", {**_BASE, "ffn_dim": 96, "word_embed_proj_dim": 64}),
    "gpt2": ("GPT2Config", {**_BASE, "n_inner": 96}),
    "gpt_neox": ("GPTNeoXConfig", _WIDE),
    "falcon": ("FalconConfig", {**_BASE, "new_decoder_architecture": True, "num_kv_heads": 2}),
    "falcon_multi_query": ("FalconConfig", {**_BASE, "multi_query": True}),
    "bloom": ("BloomConfig", _BASE),
}


def build(name: str) -> nn.Module:
    """A random model of the zoo in float32, the same each time."""
    kind, arguments = ZOO[name]
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(getattr(transformers, kind)(**arguments)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def token_ids() -> Tensor:
    """``(1, TOKENS)`` random ids without the padding id."""
    return torch.randint(3, VOCABULARY, (1, TOKENS), generator=torch.Generator().manual_seed(1))
