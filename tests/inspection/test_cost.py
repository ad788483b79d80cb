"""Bytes, products and floors of nodes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

import awqc
from awqc.inspection.cost import Rates, costs, find, like, total
from awqc.inspection.outline import find_hardware, outline
from awqc.inspection.subject import Subject, look_at, of_outline
from awqc.quantized import packed_bytes
from tests.mixtures import build

NAME = "model.layers.0.mlp.down_proj"
RATES = Rates(read=1e9, product=1e12, source="made up")


def test_a_quantized_linear(loaded: Subject) -> None:
    (cost,) = [one for one in costs(loaded, RATES) if one.linear == NAME]
    module = loaded.linears[NAME]
    n, k = module.out_features, module.in_features
    assert cost.flops == 2 * n * k
    assert cost.bytes == packed_bytes(n, k, module.scheme) + 4 * (n + k)
    assert cost.floor == pytest.approx(cost.bytes / 1e9)
    assert cost.moved == sum(launch.bytes for launch in cost.launches)
    assert (cost.kind, cost.layer) == ("mlp.down_proj", "model.layers.0")


def test_many_tokens_are_bound_by_products(config_only: Path) -> None:
    at, config = find_hardware("h200"), awqc.QuantConfig(group_size=32)
    subject = of_outline(outline(config_only, config, hardware=at, tokens=512))
    rates = Rates(read=1e15, product=1e9, source="made up")
    (cost,) = [one for one in costs(subject, rates) if one.linear == NAME]
    assert cost.floor == pytest.approx(cost.flops / 1e9)


def test_stages_are_named_by_what_reads_one_activation(loaded: Subject) -> None:
    by_stage = total(costs(loaded), lambda cost: cost.stage)
    assert list(by_stage) == [
        "before the first linear",
        "self_attn.q_proj, k_proj, v_proj",
        "self_attn.o_proj",
        "mlp.gate_proj, up_proj",
        "mlp.down_proj",
        "lm_head",
    ]
    assert len([c for c in by_stage["mlp.gate_proj, up_proj"] if c.linear]) == 4


def test_looking_at_a_tensor_moves_nothing(loaded: Subject) -> None:
    ops = {cost.op for cost in costs(loaded)}
    assert not ops & {"aten.view", "aten.transpose.int", "aten.unsqueeze", "aten.expand"}
    assert {"aten.linear", "aten.silu", "aten.embedding"} <= ops


def test_a_look_up_reads_what_it_returns(loaded: Subject) -> None:
    (cost,) = [one for one in costs(loaded) if one.op == "aten.embedding"]
    width = loaded.tensors["model.embed_tokens.weight"].shape[1]
    assert cost.bytes == 2 * 4 * width + 8


def test_flops_are_those_that_torch_counts(loaded: Subject) -> None:
    """Of what is left in float, by running it."""
    from torch.utils.flop_counter import FlopCounterMode

    (head,) = [one for one in costs(loaded) if one.linear == "lm_head"]
    weight = loaded.tensors["lm_head.weight"]
    with FlopCounterMode(display=False) as counter:
        nn.functional.linear(torch.zeros(1, weight.shape[1]), weight)
    assert head.flops == counter.get_total_flops()


def test_of_a_mixture_only_the_experts_that_have_rows_count() -> None:
    module, config = build("mixtral", num_local_experts=8), awqc.QuantConfig(group_size=32)

    def experts(tokens: int) -> int:
        found = costs(of_outline(outline(module, config, tokens=tokens)))
        return sum(cost.bytes for cost in found if "experts" in cost.kind)

    # One token goes to 2 of 8 experts; 16 tokens may go to all of them.
    assert 0 < experts(1) < experts(16) * 3 / 8


def test_nodes_are_found_by_their_name_or_their_linear(loaded: Subject) -> None:
    node = find(loaded, NAME)
    assert node is not None
    assert find(loaded, node.name) is node
    assert find(loaded, "nothing") is None
    assert like(list(loaded.linears), "layers.0.mlp.down")[0] == NAME


def test_as_json(outlined: Subject) -> None:
    found = json.loads(json.dumps([cost.as_dict() for cost in costs(outlined, RATES)]))
    (cost,) = [one for one in found if one["linear"] == NAME]
    assert cost["launches"][0]["kernel"] == "marlin_small.cu:small"
    assert cost["moved"] == cost["launches"][0]["bytes"]


def test_a_checkpoint_on_another_device(checkpoint: Path) -> None:
    """Its schemes are kept: outlined from the checkpoint, not from the defaults."""
    subject = look_at(checkpoint, gpu="a100", tokens=1)
    assert {str(module.scheme) for module in subject.linears.values()} == {"W4 g32 asym"}
    assert {module.backend.name for module in subject.linears.values()} == {"marlin"}
