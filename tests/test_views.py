"""Typed views of linears of experts: what they say of the call, and what they do not take for one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from awqc.capture import capture
from awqc.graph import Graph
from awqc.passes.canonicalize import Canonicalize
from awqc.storage.source import from_module
from awqc.views import ExpertLinear, expert_linears
from awqc.weights import Weights
from tests.passes.graphs import context_of, run

EXPERTS, ROWS, WIDTH, OUT = 3, 6, 4, 5
SORTED = torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(0))
BLOCKS = torch.randn(EXPERTS, 2, WIDTH, generator=torch.Generator().manual_seed(1))
OFFSETS = torch.tensor([1, 1, 6], dtype=torch.int32)


class Experts(nn.Module):
    """``function(module, x)`` over weights ``nk`` (E, N, K) and ``kn`` (E, K, N) and a buffer ``offsets``."""

    def __init__(self, function: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.nk = nn.Parameter(torch.randn(EXPERTS, OUT, WIDTH))
        self.kn = nn.Parameter(torch.randn(EXPERTS, WIDTH, OUT))
        self.register_buffer("offsets", OFFSETS)
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


def fallback(x: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    import transformers.integrations.moe  # registers the op

    assert transformers.integrations.moe
    return torch.ops.transformers.grouped_mm_fallback(x, weight, offsets)


def absolute(graph: Graph) -> Weights:
    """The graph's weights without their signs."""
    weights = graph.weights.like(graph.weights.dtype)
    for name in ("kn", "nk"):
        weights[name] = weights[name].abs()
    return weights


CALLS = {
    "fallback": (lambda m, x: fallback(x, m.kn, m.offsets), SORTED, True),
    "fallback on a transpose": (lambda m, x: fallback(x, m.nk.transpose(-2, -1), m.offsets), SORTED, False),
    "bmm": (lambda m, x: torch.bmm(x, m.kn), BLOCKS, True),
    "bmm on a transpose": (lambda m, x: torch.bmm(x, m.nk.permute(0, 2, 1)), BLOCKS, False),
    "matmul": (lambda m, x: x @ m.kn, BLOCKS, True),
    "matmul on a transpose": (lambda m, x: x @ m.nk.mT, BLOCKS, False),
}


def canonical(function: Callable[[Any, Tensor], Tensor], x: Tensor) -> tuple[Experts, Graph]:
    module = Experts(function).eval()
    graph, _ = run(module, [{"x": x}], Canonicalize())
    return module, graph


@pytest.mark.parametrize("case", CALLS)
def test_linears_of_experts_are_seen(case: str) -> None:
    function, x, transposed = CALLS[case]
    _, graph = canonical(function, x)
    (view,) = expert_linears(graph)
    name = "kn" if transposed else "nk"
    assert (view.parameter, view.name, view.transposed) == (name, name, transposed)
    assert (view.count, view.in_features, view.out_features) == (EXPERTS, WIDTH, OUT)
    assert view.x.name == "x"
    assert (view.offsets is None) == (x is BLOCKS)


@pytest.mark.parametrize("case", CALLS)
def test_the_view_says_what_is_computed(case: str) -> None:
    """Each expert's rows times its weight, put together, are what the module computes."""
    function, x, _ = CALLS[case]
    module, graph = canonical(function, x)
    (view,) = expert_linears(graph)
    weights = view.weight(getattr(module, view.parameter).detach())
    pieces = view.rows(x, None if view.offsets is None else OFFSETS)
    assert [len(rows) for rows in pieces] == ([2, 2, 2] if view.offsets is None else [1, 0, 5])
    expected = torch.cat([F.linear(rows, w) for rows, w in zip(pieces, weights, strict=True)])
    (found,) = graph.run({"x": x})
    magnitude = torch.cat([F.linear(rows.abs(), w.abs()) for rows, w in zip(pieces, weights, strict=True)])
    bound = 2 * WIDTH * torch.finfo(torch.float32).eps * magnitude
    assert ((found.reshape(expected.shape) - expected).abs() <= bound).all()


@pytest.mark.parametrize("transposed", [True, False])
def test_the_library_s_own_op_is_seen_where_it_can_be_traced(transposed: bool) -> None:
    """In bfloat16 on a CPU, with widths that its alignment allows."""

    def compute(m: Any, x: Tensor) -> Tensor:
        return torch._grouped_mm(x, m.kn if transposed else m.nk.mT, offs=m.offsets)

    module = Experts(compute)
    module.kn, module.nk = (
        nn.Parameter(torch.randn(EXPERTS, *size).bfloat16()) for size in [(8, 16), (16, 8)]
    )
    x = torch.randn(ROWS, 8).bfloat16()
    graph = capture(from_module(module), {"x": x}, dtype=None)
    expected = graph.run({"x": x})[0]
    Canonicalize().run(graph, context_of([{"x": x}]))
    (view,) = expert_linears(graph)
    assert (view.parameter, view.transposed) == ("kn" if transposed else "nk", transposed)
    assert (view.count, view.in_features, view.out_features) == (EXPERTS, 8, 16)
    # A product of 8 terms in two orders, each rounded to bfloat16.
    bound = 16 * torch.finfo(torch.bfloat16).eps * graph.run({"x": x.abs()}, absolute(graph))[0]
    assert ((graph.run({"x": x})[0] - expected).abs() <= bound).all()


OTHERS = {
    "a weight that is computed": (lambda m, x: torch.bmm(x, m.kn * 2), BLOCKS),
    "a weight that is picked": (lambda m, x: torch.bmm(x, m.kn[torch.tensor([2, 1, 0])]), BLOCKS),
    "one weight for all": (lambda m, x: x @ m.kn[0], BLOCKS),
    "two activations": (lambda m, x: torch.bmm(x, x.mT), BLOCKS),
    "the weight on the left": (lambda m, x: torch.bmm(m.nk, x.mT), BLOCKS),
}


@pytest.mark.parametrize("case", OTHERS)
def test_other_products_are_not_taken_for_them(case: str) -> None:
    _, graph = canonical(*OTHERS[case])
    assert list(expert_linears(graph)) == []


def test_a_view_is_a_value() -> None:
    _, graph = canonical(*CALLS["bmm"][:2])
    (view,) = expert_linears(graph)
    assert view == ExpertLinear(view.node, "kn", True)
