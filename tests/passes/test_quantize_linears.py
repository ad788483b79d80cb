"""quantize-linears: rounded linears become the canonical op; all others stay, and the report says so."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from awqc.context import Context
from awqc.graph import Graph
from awqc.passes.quantize_linears import QuantizeLinears
from awqc.passes.round_weights import RoundWeights
from awqc.quantization.schemes import Schemes
from awqc.runtime.lowered import QuantizedLinears
from tests.mixtures import Mixture
from tests.passes.experts import STACKS, mixed
from tests.passes.graphs import OBSERVED, Look, Mlp, ops, parameters, run, samples

ROUNDED = (*OBSERVED, RoundWeights())


def quantized(
    *passes: Any, module: nn.Module | None = None, **options: Any
) -> tuple[Graph, Context, QuantizedLinears]:
    graph, context = run(module or Mlp(), samples(2), *passes, QuantizeLinears(), **options)
    return graph, context, graph.facts[QuantizedLinears]


def test_a_rounded_linear_becomes_the_quantized_op() -> None:
    graph, _, found = quantized(*ROUNDED)
    assert list(found) == ["up", "down"]
    assert parameters(graph) == []
    assert ops(graph).count("awqc.qlinear") == 2
    assert (
        "= awqc.qlinear(rms_norm, up.codes, up.scales, up.zeros, up.bias, 16)" in graph.text()
        or "= awqc.qlinear(mul_1, up.codes, up.scales, up.zeros, up.bias, 16)" in graph.text()
    )
    assert "up.codes: u8[48, 32] = parameter" in graph.text()
    assert "up.scales: f16[48, 2] = parameter" in graph.text()
    assert "up.weight" not in graph.parameters()


def test_it_computes_what_the_dequantized_weights_compute() -> None:
    graph, _, found = quantized(*ROUNDED)
    module = Mlp()
    with torch.no_grad():
        module.up.weight.copy_(found["up"].dequantize())
        module.down.weight.copy_(found["down"].dequantize())
    for batch in samples(2):
        with torch.no_grad():
            want = module(batch["x"])
        (got,) = graph.run(batch)
        # One set of products in two orders, through two linears.
        assert (got - want).norm() <= 2 * 48 * torch.finfo(torch.float32).eps * want.norm()


def test_a_weight_that_is_stored_transposed() -> None:
    module = Mlp()
    module.up = Conv1D(48, 32)
    graph, _, found = quantized(*ROUNDED, module=module)
    assert found["up"].codes.shape == (48, 32)
    assert "aten.permute" not in ops(graph)


def test_a_linear_that_is_kept_stays() -> None:
    graph, context, found = quantized(*ROUNDED, keep=("up",))
    assert list(found) == ["down"]
    assert parameters(graph) == ["up.weight"]
    assert context.report.linears["up.weight"].reason == "matches keep pattern 'up'"


def test_without_a_bias() -> None:
    module = Mlp()
    module.up.bias = None
    graph, _, _ = quantized(*ROUNDED, module=module)
    assert "up.zeros, None, 16)" in graph.text()


def test_a_linear_that_a_pass_took_back_is_reported_as_kept() -> None:
    def drop(graph: Graph, context: Context) -> None:
        graph.facts[Schemes].pop("up.weight", None)

    _, context, found = quantized(*OBSERVED, Look(drop), RoundWeights())
    assert list(found) == ["down"]
    row = context.report.linears["up.weight"]
    assert (row.decision, row.reason, row.scheme) == ("kept", "no pass rounded its weight", "")
    assert context.report.linears["down.weight"].decision == "quantized"


def test_without_rounding_nothing_is_quantized_and_nothing_claims_to_be() -> None:
    graph, context, found = quantized(*OBSERVED)
    assert found == {}
    assert parameters(graph) == ["up.weight", "down.weight"]
    assert [*context.report.quantized()] == []


def test_two_calls_of_one_linear_are_left_alone() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.shared, self.other = nn.Linear(32, 32), nn.Linear(32, 32)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.shared(torch.tanh(self.shared(x))) + self.other(x)

    graph, _, found = quantized(*ROUNDED, module=Twice())
    assert list(found) == ["other"]
    assert parameters(graph) == ["shared.weight", "shared.weight"]


@pytest.mark.parametrize("transposed", [False, True])
def test_linears_of_experts_become_one_op(transposed: bool) -> None:
    graph, _ = mixed(*OBSERVED, RoundWeights(), QuantizeLinears(), transposed=transposed)
    assert ops(graph).count("awqc.qexperts") == 2
    assert "awqc.grouped_linear" not in ops(graph)
    weights = graph.facts[QuantizedLinears]
    assert {*STACKS, "shared"} == set(weights)
    assert weights["first"].codes.shape == (4, 64, 32)
    assert "first.codes" in graph.parameters()
    assert "first" not in graph.parameters()
    module = Mixture(transposed=transposed)
    for name in STACKS:
        dense = weights[name].dequantize()
        getattr(module, name).data = dense.mT if transposed else dense
    module.shared.weight.data = weights["shared"].dequantize()
    batch = samples(24, tokens=16)[0]
    expected = module(**batch)
    bound = 64 * len(graph.nodes) ** 0.5 * torch.finfo(torch.float32).eps
    assert (graph.run(batch)[0] - expected).norm() <= bound * expected.norm()
