"""Tiny random models and token ids that tests of the whole compiler share. Nothing here is ever changed:
a compile that touched its input would fail the tests that follow it."""

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

#: Input channels that :func:`outlier_llama` makes large, and how large.
OUTLIERS = {5: 32.0, 23: 16.0, 42: 8.0}


def build_llama(seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.1,
        bos_token_id=1,
        eos_token_id=0,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="session")
def tiny_llama() -> LlamaForCausalLM:
    """Two layers of width 64 with grouped-query attention, float32."""
    return build_llama()


@pytest.fixture(scope="session")
def outlier_llama() -> LlamaForCausalLM:
    """The function of ``tiny_llama`` with outlier channels: a norm's weight is multiplied and the columns
    that read it are divided, by powers of two, so not a bit of the output changes but for rounding."""
    model = build_llama()
    with torch.no_grad():
        for layer in model.model.layers:
            attention, mlp = layer.self_attn, layer.mlp
            for norm, readers in (
                (layer.input_layernorm, (attention.q_proj, attention.k_proj, attention.v_proj)),
                (layer.post_attention_layernorm, (mlp.gate_proj, mlp.up_proj)),
            ):
                for channel, factor in OUTLIERS.items():
                    norm.weight[channel] *= factor
                    for reader in readers:
                        reader.weight[:, channel] /= factor
    return model


@pytest.fixture(scope="session")
def token_ids() -> Tensor:
    """``(16, 16)`` random ids; samples 7 and 15 are held out from searches."""
    return torch.randint(2, 128, (16, 16), generator=torch.Generator().manual_seed(1))
