"""What the golden tables must say about each architecture, in words."""

import pytest
import torch
from torch import Tensor

from tests.zoo.models import HEAD, LAYERS
from tests.zoo.specimen import specimen

HEADS, PAIRS, WIDTH, INNER = 4, 2, 64, 96
LAYER = range(LAYERS)
#: Query head -> the key and value head that it shares, channel by channel.
SHARED = torch.arange(PAIRS * HEAD).reshape(PAIRS, 1, HEAD).expand(PAIRS, HEADS // PAIRS, HEAD).flatten()

LLAMA_LIKE = {
    "llama": "post_attention_layernorm",
    "mistral": "post_attention_layernorm",
    "granite": "post_attention_layernorm",
    "smollm3": "post_attention_layernorm",
    "qwen2": "post_attention_layernorm",
    "qwen3": "post_attention_layernorm",
    "stablelm": "post_attention_layernorm",
    "gemma2": "pre_feedforward_layernorm",
    "gemma3": "pre_feedforward_layernorm",
}


def short(names: tuple[str, ...], layer: str) -> list[str]:
    return [name.removeprefix(layer).removesuffix(".weight") for name in names]


def alive(name: str, linear: str) -> Tensor:
    """Channels of the linear's group that may be scaled."""
    return specimen(name).group_of(linear).alive.nonzero().flatten()


def columns(name: str, linear: str, transposed: bool = False) -> Tensor:
    """Channel of each input column of the linear; checks that its rows are alike."""
    group = specimen(name).group_of(linear)
    part = next(p for p in group.consumers if p.parameter == linear)
    ids = part.ids.t() if transposed else part.ids
    assert len(ids) == 1
    return ids[0].long()


@pytest.mark.parametrize("layer", LAYER)
@pytest.mark.parametrize("name", LLAMA_LIKE)
def test_llama_like_models_have_four_groups_a_layer(name: str, layer: int) -> None:
    found, prefix = specimen(name), f"model.layers.{layer}."
    groups = [g for g in found.analysis.groups if g.name.startswith(prefix)]
    norm = LLAMA_LIKE[name]
    assert [(short((g.name,), prefix)[0], short(g.linears, prefix)) for g in groups] == [
        ("input_layernorm", ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"]),
        ("self_attn.v_proj", ["self_attn.o_proj"]),
        (norm, ["mlp.gate_proj", "mlp.up_proj"]),
        ("mlp.up_proj", ["mlp.down_proj"]),
    ]
    assert all(bool(g.alive.all()) for g in groups)
    assert [g.channels for g in groups] == [WIDTH, PAIRS * HEAD, WIDTH, INNER]


@pytest.mark.parametrize("name", [*LLAMA_LIKE, "olmo2", "cohere", "nemotron", "starcoder2"])
def test_query_heads_share_the_channels_of_their_value_head(name: str) -> None:
    for layer in LAYER:
        assert torch.equal(columns(name, f"model.layers.{layer}.self_attn.o_proj.weight"), SHARED)


@pytest.mark.parametrize(
    "name", ["llama", "mistral", "granite", "qwen2", "qwen3", "stablelm", "olmo2", "phi3"]
)
def test_the_last_norm_scales_an_untied_head(name: str) -> None:
    group = specimen(name).group_of("lm_head.weight")
    assert group.name == "model.norm.weight"
    assert group.linears == ("lm_head.weight",)


@pytest.mark.parametrize(
    ("name", "embedding"),
    [
        ("gemma2", "model.embed_tokens.weight"),
        ("gemma3", "model.embed_tokens.weight"),
        ("cohere", "model.embed_tokens.weight"),
        ("smollm3", "model.embed_tokens.weight"),
        ("starcoder2", "model.embed_tokens.weight"),
        ("opt", "model.decoder.embed_tokens.weight"),
        ("gpt2", "transformer.wte.weight"),
        ("falcon", "transformer.word_embeddings.weight"),
        ("bloom", "transformer.word_embeddings.weight"),
    ],
)
def test_a_tied_head_is_refused_because_the_embedding_would_change(name: str, embedding: str) -> None:
    assert (
        specimen(name)
        .refusal_of(embedding)
        .startswith("its weight is also read by aten.embedding (embedding), which would change: ")
    )


def test_biases_of_scaled_rows_and_norms_join() -> None:
    def producers(name: str, linear: str) -> list[str]:
        return short(tuple(p.parameter for p in specimen(name).group_of(linear).producers), "model.")

    assert producers("qwen2", "model.layers.0.self_attn.o_proj.weight") == [
        "layers.0.self_attn.v_proj",
        "layers.0.self_attn.v_proj.bias",
    ]
    assert producers("stablelm", "model.layers.0.self_attn.q_proj.weight") == [
        "layers.0.input_layernorm",
        "layers.0.input_layernorm.bias",
    ]


@pytest.mark.parametrize("name", ["gemma2", "gemma3", "nemotron"])
def test_one_plus_weight_is_the_site_that_is_divided(name: str) -> None:
    group = specimen(name).group_of("model.layers.0.self_attn.q_proj.weight")
    site = group.producers[0].site
    assert (site.parameter, site.offset, site.factor) == ("model.layers.0.input_layernorm.weight", 1.0, 1.0)


def test_phi3_gives_its_value_rows_and_its_up_rows() -> None:
    qkv, query = (HEADS + 2 * PAIRS) * HEAD, HEADS * HEAD
    for layer in LAYER:
        prefix = f"model.layers.{layer}."
        values = torch.arange(query + PAIRS * HEAD, qkv)
        assert torch.equal(alive("phi3", f"{prefix}self_attn.o_proj.weight"), values)
        assert torch.equal(columns("phi3", f"{prefix}self_attn.o_proj.weight"), values[SHARED])
        up = torch.arange(INNER, 2 * INNER)
        assert torch.equal(alive("phi3", f"{prefix}mlp.down_proj.weight"), up)
        assert torch.equal(columns("phi3", f"{prefix}mlp.down_proj.weight"), up)


@pytest.mark.parametrize(
    ("name", "dense"),
    [
        ("gpt_neox", "gpt_neox.layers.{}.attention.dense.weight"),
        ("bloom", "transformer.h.{}.self_attention.dense.weight"),
    ],
)
def test_interleaved_qkv_gives_the_value_rows_of_each_head(name: str, dense: str) -> None:
    values = torch.arange(HEADS * 3 * HEAD).reshape(HEADS, 3, HEAD)[:, 2].flatten()
    for layer in LAYER:
        assert torch.equal(alive(name, dense.format(layer)), values)
        assert torch.equal(columns(name, dense.format(layer)), values)


def test_falcon_gives_the_last_head_of_each_group_of_its_qkv() -> None:
    group = HEADS // PAIRS + 2
    values = torch.arange(PAIRS * group * HEAD).reshape(PAIRS, group, HEAD)[:, -1].flatten()
    for layer in LAYER:
        dense = f"transformer.h.{layer}.self_attention.dense.weight"
        assert torch.equal(alive("falcon", dense), values)
        assert torch.equal(columns("falcon", dense), values[SHARED])


def test_falcon_with_one_value_head_ties_all_query_heads() -> None:
    values = torch.arange((HEADS + 1) * HEAD, (HEADS + 2) * HEAD)
    for layer in LAYER:
        dense = f"transformer.h.{layer}.self_attention.dense.weight"
        assert torch.equal(alive("falcon_multi_query", dense), values)
        assert torch.equal(columns("falcon_multi_query", dense), values.repeat(HEADS))


def test_parallel_blocks_share_one_group() -> None:
    cohere = specimen("cohere").group_of("model.layers.0.mlp.gate_proj.weight")
    attention = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"]
    assert short(cohere.linears, "model.layers.0.") == [*attention, "mlp.gate_proj", "mlp.up_proj"]
    falcon = specimen("falcon_multi_query").group_of("transformer.h.0.mlp.dense_h_to_4h.weight")
    assert short(falcon.linears, "transformer.h.0.") == [
        "self_attention.query_key_value",
        "mlp.dense_h_to_4h",
    ]


def test_gpt2_weights_are_scaled_in_their_transposed_layout() -> None:
    values = torch.arange(2 * WIDTH, 3 * WIDTH)
    for layer in LAYER:
        prefix = f"transformer.h.{layer}."
        group = specimen("gpt2").group_of(f"{prefix}attn.c_proj.weight")
        assert [(p.parameter, tuple(p.ids.shape)) for p in group.producers] == [
            (f"{prefix}attn.c_attn.weight", (1, 3 * WIDTH)),
            (f"{prefix}attn.c_attn.bias", (3 * WIDTH,)),
        ]
        assert torch.equal(alive("gpt2", f"{prefix}attn.c_proj.weight"), values)
        assert torch.equal(columns("gpt2", f"{prefix}attn.c_proj.weight", transposed=True), values)


def test_relu_and_its_square_pass_between_the_layers_of_a_block() -> None:
    opt = specimen("opt").group_of("model.decoder.layers.0.fc2.weight")
    assert [(short((p.parameter,), "model.decoder.layers.0.")[0], p.degree) for p in opt.parts] == [
        ("fc1", 1.0),
        ("fc1.bias", 1.0),
        ("fc2", -1.0),
    ]
    nemotron = specimen("nemotron").group_of("model.layers.0.mlp.down_proj.weight")
    assert [p.degree for p in nemotron.parts] == [1.0, -2.0]


@pytest.mark.parametrize(
    ("name", "linear"),
    [
        ("starcoder2", "model.layers.0.mlp.c_proj.weight"),
        ("gpt_neox", "gpt_neox.layers.0.mlp.dense_4h_to_h.weight"),
        ("falcon", "transformer.h.0.mlp.dense_4h_to_h.weight"),
    ],
)
def test_gelu_refuses(name: str, linear: str) -> None:
    assert specimen(name).refusal_of(linear) == "aten.gelu (gelu): no scale passes through aten.gelu"


def test_a_block_without_a_norm_in_front_reads_the_residual() -> None:
    for linear in ("self_attn.q_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj"):
        reason = specimen("olmo2").refusal_of(f"model.layers.1.{linear}.weight")
        assert reason.startswith("aten.add (add")
        assert reason.endswith(", which is not scaled along")
