"""Tiny mixtures of experts: those of transformers that differ in kind, and one of no library at all."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
import transformers
import transformers.integrations.moe  # defines an op
from torch import Tensor, nn

VOCABULARY, EXPERTS = 96, 4

_BASE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "max_position_embeddings": 64,
    "initializer_range": 0.1,
    "num_experts_per_tok": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_LOCAL = {**_BASE, "num_local_experts": EXPERTS}
_MANY = {**_BASE, "num_experts": EXPERTS, "moe_intermediate_size": 32, "decoder_sparse_step": 1}
_LATENT = {
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "v_head_dim": 16,
}

#: Name -> the class of its config and its arguments.
MIXTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("MixtralConfig", _LOCAL),
    # a shared expert, and a gate in front of it
    "qwen2_moe": ("Qwen2MoeConfig", {**_MANY, "shared_expert_intermediate_size": 64}),
    "qwen3_moe": ("Qwen3MoeConfig", {**_MANY, "head_dim": 16}),
    "olmoe": ("OlmoeConfig", {**_BASE, "num_experts": EXPERTS}),
    # stored as stacks, under other names; logits scaled after the head
    "granitemoe": ("GraniteMoeConfig", _LOCAL),
    # stored as transposed stacks, with biases, gates and what they gate interleaved
    "gpt_oss": ("GptOssConfig", {**_LOCAL, "head_dim": 16}),
    # latent attention, a dense first layer, a shared expert, a bias of the routing
    "deepseek_v3": (
        "DeepseekV3Config",
        {
            **_BASE,
            **_LATENT,
            "num_key_value_heads": 4,
            "n_routed_experts": EXPERTS,
            "n_group": 1,
            "topk_group": 1,
            "moe_intermediate_size": 32,
            "n_shared_experts": 1,
            "first_k_dense_replace": 1,
        },
    ),
}


def build(name: str, **changes: int) -> Any:
    """A random model in float32, the same each time, with ``changes`` to its config."""
    kind, arguments = MIXTURES[name]
    torch.manual_seed(0)
    config = getattr(transformers, kind)(**{**arguments, **changes})
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def token_ids(seed: int, count: int = 16, length: int = 32) -> Tensor:
    """``(count, length)`` random ids without the special ones."""
    return torch.randint(3, VOCABULARY, (count, length), generator=torch.Generator().manual_seed(seed))


class Mixture(nn.Module):
    """norm -> router -> the two best of some experts, each up -> relu -> down, in words of its own.

    Args:
        transposed: store the experts' weights ``(E, K, N)``.
    """

    def __init__(
        self, width: int = 32, inner: int = 64, count: int = EXPERTS, transposed: bool = False
    ) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm = nn.LayerNorm(width)
        self.chooser = nn.Linear(width, count, bias=False)
        self.shared = nn.Linear(width, width)
        shapes = [(count, inner, width), (count, width, inner)]
        self.first, self.second = (
            nn.Parameter(torch.randn(n, k, o) / 6 if transposed else torch.randn(n, o, k) / 6)
            for n, o, k in shapes
        )
        self.transposed, self.count = transposed, count

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x).flatten(0, -2)
        scores, chosen = self.chooser(h).softmax(-1).topk(2)
        order = chosen.flatten().argsort(stable=True)
        ends = F.one_hot(chosen.flatten(), self.count).sum(0).cumsum(0).to(torch.int32)
        rows = h[order // 2]
        inner = torch.relu(self._product(rows, self.first, ends))
        outer = self._product(inner, self.second, ends) * scores.flatten()[order, None]
        mixed = torch.zeros_like(h).index_add(0, order // 2, outer)
        return x + (mixed + self.shared(h)).view(x.shape)

    def _product(self, rows: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
        # torch's own is traced in bfloat16 only.
        product = torch.ops.transformers.grouped_mm_fallback
        return product(rows, weight if self.transposed else weight.mT, ends)
