"""Tiny random models and token ids that tests of the whole compiler share. Nothing here is ever changed:
a compile that touched its input would fail the tests that follow it."""

import os

import pytest
import torch

if not torch.cuda.is_available():
    # Triton reads it when it is imported, as it is by transformers, and then interprets kernels on the CPU.
    os.environ.setdefault("TRITON_INTERPRET", "1")

from torch import Tensor
from transformers import LlamaForCausalLM

from awqc.kernels import llvm
from tests.models import llama

#: Input channels that :func:`outlier_llama` makes large, and how large.
OUTLIERS = {5: 32.0, 23: 16.0, 42: 8.0}


@pytest.fixture
def without_llvm(monkeypatch: pytest.MonkeyPatch) -> str:
    """The machine of a user who has no llvmlite: why awqc's own CPU kernel does not run there."""
    reason = "needs llvmlite, which is not installed: pip install 'awqc[cpu]'"
    monkeypatch.setattr(llvm, "missing", lambda: reason)
    return reason


@pytest.fixture(scope="session")
def tiny_llama() -> LlamaForCausalLM:
    """Two layers of width 64 with grouped-query attention, float32."""
    return llama()


@pytest.fixture(scope="session")
def outlier_llama() -> LlamaForCausalLM:
    """The function of ``tiny_llama`` with outlier channels: a norm's weight is multiplied and the columns
    that read it are divided, by powers of two, so not a bit of the output changes but for rounding."""
    model = llama()
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
