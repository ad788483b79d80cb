"""Language models: what they are called, and where the tiny config needs more than small sizes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tests.zoo.sizes import words

_DECODERS = words("""
    afmoe apertus arcee aria_text axk1 bailing_hybrid bamba biogpt bitnet bloom blt codegen cohere cohere2
    cohere2_moe cpmant ctrl cwm dbrx deepseek_v2 deepseek_v3 deepseek_v32 diffllama doge dots1 emu3
    ernie4_5 ernie4_5_moe exaone4 exaone_moe falcon falcon_h1 falcon_mamba flex_olmo fuyu gemma gemma2
    gemma3_text gemma3n_text gemma4_text glm glm4 glm4_moe glm4_moe_lite glm_moe_dsa gpt2 gpt_bigcode
    gpt_neo gpt_neox gpt_neox_japanese gpt_oss gptj granite granitemoe granitemoehybrid granitemoeshared
    helium hunyuan_v1_dense hunyuan_v1_moe jamba jetmoe kimi_linear laguna lfm2 lfm2_moe llama llama4_text
    longcat_flash mamba mamba2 mimo_v2_flash minicpm3 minimax minimax_m2 ministral ministral3 mistral
    mixtral modernbert-decoder mpt nanochat nemotron nemotron_h olmo olmo2 olmo3 olmo_hybrid olmoe
    openai-gpt opt persimmon phi phi3 phimoe qwen2 qwen2_moe qwen3 qwen3_5_text qwen3_5_moe_text qwen3_moe
    qwen3_next recurrent_gemma reformer rwkv seed_oss smollm3 solar_open stablelm starcoder2 trocr
    vaultgemma xglm xlm xlnet xlstm youtu zamba zamba2
""")
_ENCODERS = words("""
    albert bert big_bird camembert convbert data2vec-text deberta deberta-v2 distilbert electra ernie esm
    eurobert flaubert fnet funnel ibert layoutlm longformer luke megatron-bert mobilebert modernbert mpnet
    mra nomic_bert nystromformer perceiver rembert roberta roberta-prelayernorm roc_bert roformer
    squeezebert tapas xlm-roberta xlm-roberta-xl xmod yoso
""")
_TRANSLATORS = words("""
    bart bigbird_pegasus blenderbot blenderbot-small fsmt led longt5 m2m_100 marian mbart mt5 mvp nllb-moe
    pegasus pegasus_x plbart prophetnet switch_transformers t5 t5gemma umt5
""")

_ROTARY = {"rotary_dim": 8}
#: Model type -> fields that the sizes of everybody do not suit.
CHANGES: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1]},
    "blt": {"encoder_hash_byte_group_vocab": 128, "local_attention_window_len": 8},
    "codegen": _ROTARY,
    "cpmant": {"position_bias_num_segment_buckets": 4, "segment_types": 4, "prompt_types": 4},
    "dbrx": {
        "attn_config": {"rope_theta": 10000.0, "kv_n_heads": 2, "clip_qkv": 8},
        "ffn_config": {"ffn_hidden_size": 32},
    },
    "falcon": {"new_decoder_architecture": True},
    "falcon_h1": {"mamba_d_ssm": 128},
    "fsmt": {"src_vocab_size": 96, "tgt_vocab_size": 96},
    "gemma3n_text": {
        "num_kv_shared_layers": 1,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "num_hidden_layers": 4,
        "intermediate_size": [96] * 4,
        "altup_num_inputs": 2,
        "laurel_rank": 8,
        "activation_sparsity_pattern": [0.5, 0.0, 0.0, 0.0],
    },
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 8},
    "gptj": _ROTARY,
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"]},
    "jamba": {
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
    },
    "lfm2_moe": {
        "layer_types": ["conv", "full_attention", "conv"],
        "num_hidden_layers": 3,
        "num_dense_layers": 1,
    },
    "luke": {"entity_vocab_size": 32, "entity_emb_size": 16},
    "mamba2": {"num_heads": 8},
    "perceiver": {
        "num_latents": 16,
        "d_latents": 64,
        "num_self_attends_per_block": 2,
        "num_self_attention_heads": 4,
        "num_cross_attention_heads": 4,
    },
    "recurrent_gemma": {"num_hidden_layers": 3, "attention_window_size": 8},
    "reformer": {
        "is_decoder": True,
        "axial_pos_shape": [4, 16],
        "axial_pos_embds_dim": [16, 48],
        "attn_layers": ["local", "lsh"],
        "local_attn_chunk_length": 8,
        "lsh_attn_chunk_length": 8,
        "feed_forward_size": 96,
        "attention_head_size": 16,
        "num_buckets": 2,
        "hash_seed": 0,
    },
    "roc_bert": {"pronunciation_vocab_size": 96, "shape_vocab_size": 96},
    "xlstm": {"chunk_size": 16},
    "xmod": {"languages": ["en_XX"], "default_language": "en_XX"},
    "zamba": {
        "layers_block_type": ["linear_attention", "hybrid", "linear_attention", "hybrid"],
        "num_hidden_layers": 4,
        "attention_hidden_size": 128,
        "attention_head_dim": 32,
    },
}

HEADS = (
    dict.fromkeys(_DECODERS, "CausalLM")
    | dict.fromkeys(_ENCODERS, "MaskedLM")
    | dict.fromkeys(_TRANSLATORS, "Seq2SeqLM")
)
INPUTS: dict[str, Callable[..., Any]] = {}
