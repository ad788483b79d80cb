"""Products that move calibration tokens: rounded where asked for, said so, and statistics unharmed."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from awqc.graph import Graph
from awqc.observers import products
from awqc.observers.products import RoundedLinear, propagation_dtype, rounded_linears
from awqc.observers.statistics import Statistics
from awqc.passes.canonicalize import Canonicalize
from awqc.passes.round_weights import RoundWeights
from awqc.views import expert_linears
from tests.mixtures import Mixture
from tests.passes.graphs import OBSERVED, Look, Mlp, context_of, graph_of, run, samples

CPU = torch.device("cpu")


@pytest.mark.parametrize("bias", [False, True])
def test_a_rounded_linear_is_within_the_rounding_of_its_operands(bias: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(5, 64, generator=generator), torch.randn(7, 64, generator=generator)
    offset = 100 * torch.randn(7, generator=generator) if bias else None
    got = RoundedLinear(torch.bfloat16)(x, weight, offset)
    exact = F.linear(x.double(), weight.double())
    # Each operand and the result is rounded once; the bias, which is large here, is not.
    eps = torch.finfo(torch.bfloat16).eps / 2
    bound = 2 * eps * (x.abs().double() @ weight.abs().double().T) + 1.01 * eps * exact.abs()
    error = (got.double() - exact - (0 if offset is None else offset.double())).abs()
    assert (error <= bound + torch.finfo(torch.float32).eps * got.abs()).all()
    assert got.dtype == torch.float32
    assert error.max() > torch.finfo(torch.float32).eps * got.abs().max()  # it was rounded


@pytest.mark.parametrize(
    ("option", "dtype", "fast", "want"),
    [
        ("auto", torch.float32, True, torch.bfloat16),
        ("auto", torch.float32, False, None),
        ("auto", torch.float64, True, None),
        ("auto", torch.float16, True, None),
        ("float32", torch.float32, True, None),
        ("float32", torch.bfloat16, True, torch.float32),
        ("bfloat16", torch.float32, False, torch.bfloat16),
        ("bfloat16", torch.bfloat16, True, None),
    ],
)
def test_the_choice_of_dtype(
    option: str, dtype: torch.dtype, fast: bool, want: torch.dtype | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(products, "fast_in_bfloat16", lambda device: fast)
    assert propagation_dtype(option, dtype, CPU) == want


def test_only_linears_are_rounded() -> None:
    graph = graph_of(Mlp(), **samples(1)[0])
    assert [str(node.target) for node in rounded_linears(graph.nodes, torch.bfloat16)] == [
        "aten.linear.default"
    ] * 2
    assert rounded_linears(graph.nodes, None) == {}


def second_gram(propagate_dtype: str) -> tuple[torch.Tensor, list[tuple[str, str]]]:
    """Gram matrix at the input of the second stage, and the notes of the report."""
    seen: list[Statistics] = []

    def see(graph: Graph, context: object) -> None:
        seen.append(graph.facts[Statistics])

    passes = (*OBSERVED, Look(see), RoundWeights(method="nearest"))
    _, context = run(Mlp(), samples(2), *passes, propagate_dtype=propagate_dtype)
    (found,) = seen[1].values()
    return found.gram, context.report.notes


def test_later_statistics_see_rounded_products_and_the_report_says_so() -> None:
    exact, quiet = second_gram("float32")
    rounded, notes = second_gram("bfloat16")
    assert quiet == []
    assert notes == [("calibration", "tokens move through products in torch.bfloat16")]
    error = float((rounded - exact).norm() / exact.norm())
    # Three roundings of a factor, each of at most half an eps, twice in a product of two activations.
    assert 0 < error < 3 * torch.finfo(torch.bfloat16).eps


def test_linears_of_experts_are_rounded_too() -> None:
    graph = graph_of(Mixture(), **samples(1)[0])
    Canonicalize().run(graph, context_of([]))
    views = list(expert_linears(graph))
    calls = rounded_linears(graph.nodes, torch.bfloat16)
    assert {view.node for view in views} <= set(calls)
    assert not rounded_linears(graph.nodes, None)
    x, offsets = torch.randn(10, 32), torch.tensor([3, 3, 8, 10])
    weight = Mixture().first.detach()
    found = calls[views[0].node](x, weight, offsets)
    expected = torch.ops.awqc.grouped_linear(x, weight, offsets)
    assert found.dtype == torch.float32
    # Operands and result are rounded once each.
    assert 0 < (found - expected).norm() <= 3 * torch.finfo(torch.bfloat16).eps / 2 * expected.norm()
