"""Any transformers config, made tiny: fields are known by what they mean, not by whose they are.

``small(LlamaConfig)`` sets every field of :data:`SIZES` that the class has, gives special tokens ids inside
the vocabulary, does the same to configs inside the config, and keeps one layer of each kind that the default
config mixes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from transformers import CONFIG_MAPPING, PreTrainedConfig

VOCABULARY, WIDTH, HEADS, PAIRS, HEAD, INNER, LAYERS = 96, 64, 4, 2, 16, 96, 2
IMAGE, PATCH, CONTEXT = 32, 8, 64
#: Ids below are text; those from here on stand for images, audio and the like.
SPECIAL = 80


def words(text: str) -> list[str]:
    """The words of ``text``: how long tables of names are written here."""
    return text.split()


_WIDTHS = words("""
    hidden_size d_model n_embd dim embed_dim embedding_size emb_dim projection_dim out_hidden_size
    word_embed_proj_dim attention_hidden_size encoder_hidden_size text_hidden_size pooler_output_size
    text_embed_dim projector_hidden_size output_hidden_size text_config_hidden_size hidden_dim
    vision_hidden_size hidden_size_global encoder_embed_dim decoder_hidden_size classifier_proj_size
    decoder_embed_dim
""")
_INNER = words("""
    intermediate_size ffn_dim d_ff n_inner encoder_ffn_dim decoder_ffn_dim mlp_dim d_inner ffn_hidden_size
    decoder_intermediate_size encoder_intermediate_size
""")
_EXPERT_INNER = [
    "moe_intermediate_size",
    "shared_expert_intermediate_size",
    "shared_intermediate_size",
    "expert_ffn_hidden_size",
    "moe_shared_expert_intermediate_size",
    "shared_experts_intermediate_size",
    "expert_hidden_size",
]
_LAYERS = words("""
    num_hidden_layers n_layer num_layers n_layers encoder_layers decoder_layers num_encoder_layers
    num_decoder_layers depth layers encoder_num_hidden_layers decoder_num_hidden_layers
    num_hidden_layers_encoder num_blocks
""")
_HEADS = words("""
    num_attention_heads n_head num_heads n_heads attention_heads encoder_attention_heads
    decoder_attention_heads num_encoder_attention_heads num_decoder_attention_heads
    encoder_num_attention_heads decoder_num_attention_heads
""")
_PAIRS = ["num_key_value_heads", "num_kv_heads", "encoder_num_key_value_heads", "decoder_num_key_value_heads"]
_CONTEXT = words("""
    max_position_embeddings n_positions n_ctx max_seq_len max_source_positions max_target_positions
    max_text_len
""")

#: Field -> its tiny value.
SIZES: dict[str, Any] = {
    **dict.fromkeys(_WIDTHS, WIDTH),
    **dict.fromkeys(_INNER, INNER),
    **dict.fromkeys(_EXPERT_INNER, 32),
    **dict.fromkeys(_LAYERS, LAYERS),
    **dict.fromkeys(_HEADS, HEADS),
    **dict.fromkeys(_PAIRS, PAIRS),
    **dict.fromkeys(_CONTEXT, CONTEXT),
    **dict.fromkeys(("vocab_size", "vocabulary_size", "vocab_size_per_layer_input"), VOCABULARY),
    **dict.fromkeys(("head_dim", "v_head_dim", "qk_nope_head_dim", "d_kv", "global_head_dim"), HEAD),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(
        ("num_experts_per_tok", "moe_topk", "moe_k", "top_k_experts", "num_experts_per_token"), 2
    ),
    **dict.fromkeys(("n_group", "topk_group", "num_shared_experts", "n_shared_experts"), 1),
    **dict.fromkeys(("bos_token_id", "decoder_start_token_id"), 1),
    "moe_num_shared_experts": 1,
    "first_k_dense_replace": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "qk_rope_head_dim": 8,
    "kv_lora_rank": 32,
    "q_lora_rank": 48,
    "query_pre_attn_scalar": HEAD,
    "sliding_window": 8,
    "attention_chunk_size": 8,
    "hidden_size_per_layer_input": 16,
    # state space and linear attention
    "state_size": 8,
    "ssm_state_size": 8,
    "mamba_d_state": 8,
    "mamba_n_heads": 8,
    "mamba_num_heads": 8,
    "mamba_d_head": HEAD,
    "mamba_head_dim": HEAD,
    "mamba_chunk_size": 8,
    "chunk_size": 8,
    "time_step_rank": 4,
    "mamba_dt_rank": 4,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": HEAD,
    "linear_value_head_dim": HEAD,
    # images and sound
    "image_size": IMAGE,
    "patch_size": PATCH,
    "num_position_embeddings": 64,
    "num_mel_bins": 16,
}
#: Field of one number a stage -> the numbers of up to seven stages.
STAGES: dict[str, list[int]] = {
    "depths": [1, 1, 1, 1],
    "depth": [1, 1, 1],
    "hidden_sizes": [16, 32, 64, 64],
    "embed_dims": [16, 32, 64, 64],
    "num_attention_heads": [1, 2, 4, 4],
    "num_heads": [1, 2, 4, 4],
    "conv_dim": [32] * 7,
}
#: Rotary sections of time, height and width, for a head of :data:`HEAD` channels.
_SECTIONS = [2, 3, 3]


def small(kind: type[PreTrainedConfig], changes: Mapping[str, Any] = {}) -> PreTrainedConfig:
    """A tiny config of the class ``kind``.

    Args:
        kind: the class of the config.
        changes: fields that differ from :data:`SIZES`, as mappings for configs inside the config; None drops
            a field, which leaves it at its default.
    """
    default = vars(kind())
    fields = [field.name for field in dataclasses.fields(kind)]
    values = {name: SIZES[name] for name in fields if _fits(name, default.get(name))}
    if "kv_lora_rank" in fields:  # one latent for all heads, so that there are no groups of them
        values |= (
            {"num_key_value_heads": HEADS, "head_dim": SIZES["qk_rope_head_dim"]}
            if "head_dim" in fields
            else {"num_key_value_heads": HEADS}
        )
    values |= _layers(default, fields, changes)
    values |= _special_tokens(default, fields)
    for name in STAGES.keys() & fields:
        stages = default.get(name)
        if isinstance(stages, (list, tuple)) and len(stages) <= len(STAGES[name]):
            values[name] = STAGES[name][: len(stages)]
    rope = default.get("rope_parameters")
    if isinstance(rope, dict) and "mrope_section" in rope:
        values["rope_parameters"] = {**rope, "mrope_section": _SECTIONS}
    for name in fields:
        inner = default.get(name)
        if isinstance(inner, PreTrainedConfig):
            change = dict(changes.get(name) or {})
            other = change.pop("model_type", None)
            values[name] = small(CONFIG_MAPPING[other] if other else type(inner), change)
    values |= {k: v for k, v in changes.items() if not isinstance(values.get(k), PreTrainedConfig)}
    return kind(**{k: v for k, v in values.items() if not (k in changes and changes[k] is None)})


def _fits(name: str, default: Any) -> bool:
    """Whether the tiny value may replace the default: not where one number stands for several."""
    return name in SIZES and not isinstance(default, (list, tuple, bool))


def _layers(default: Mapping[str, Any], fields: list[str], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Per-layer lists cut to one layer of each kind, two at least, and their number."""
    depth = default.get("num_hidden_layers") or default.get("n_layer")
    lists = {
        name: default[name]
        for name in fields
        if isinstance(default.get(name), (list, tuple)) and len(default[name]) == depth
        if isinstance(default[name][0], (str, int, bool)) and name not in changes
    }
    if not isinstance(depth, int) or not lists:
        return {}
    kinds = list(zip(*lists.values(), strict=True))
    chosen = [i for i, kind in enumerate(kinds) if kinds.index(kind) == i][:4]
    chosen += [i for i in range(depth) if i not in chosen][: max(0, LAYERS - len(chosen))]
    chosen.sort()
    count = {name: len(chosen) for name in ("num_hidden_layers", "n_layer") if name in fields}
    return {name: [values[i] for i in chosen] for name, values in lists.items()} | count


def _special_tokens(default: Mapping[str, Any], fields: list[str]) -> dict[str, int]:
    """Ids from the end of the vocabulary for images, audio and the like."""
    ending = ("_token_id", "_token_index")
    names = [n for n in fields if n.endswith(ending) and n not in SIZES and isinstance(default.get(n), int)]
    return {name: VOCABULARY - 1 - i for i, name in enumerate(sorted(names, key=_rank))}


def _rank(name: str) -> tuple[bool, str]:
    """Images first: their id is then the same everywhere."""
    return name.removesuffix("_id").removesuffix("_index") != "image_token", name
