"""canonicalize: one form for linears, nothing that computes nothing, and hands off everything else."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from awqc.passes.canonicalize import Canonicalize
from awqc.views import linears
from tests.passes.graphs import graph_of, ops, run

X = torch.randn(1, 5, 8, generator=torch.Generator().manual_seed(0))


class Forward(nn.Module):
    """``function(module, x)`` over a weight ``w`` (8, 8), a bias ``b`` (8,) and experts ``e`` (1, 8, 8)."""

    def __init__(self, function: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.w = nn.Parameter(torch.randn(8, 8))
        self.b = nn.Parameter(torch.randn(8))
        self.e = nn.Parameter(torch.randn(1, 8, 8))
        self.register_buffer("mix", torch.randn(8, 8))
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


def flat(x: Tensor) -> Tensor:
    return x.reshape(5, 8)


REWRITES = {
    "matmul": (lambda m, x: x @ m.w, True, False),
    "matmul with the transpose": (lambda m, x: x @ m.w.T, False, False),
    "matmul with a permuted weight": (lambda m, x: x @ m.w.permute(1, 0), False, False),
    "mm": (lambda m, x: torch.mm(flat(x), m.w), True, False),
    "addmm": (lambda m, x: torch.addmm(m.b, flat(x), m.w), True, True),
    "addmm with the transpose": (lambda m, x: torch.addmm(m.b, flat(x), m.w.t()), False, True),
}


@pytest.mark.parametrize("case", REWRITES)
def test_what_is_a_linear_becomes_one(case: str) -> None:
    function, transposed, bias = REWRITES[case]
    module = Forward(function)
    graph, _ = run(module, [{"x": X}], Canonicalize())
    (view,) = linears(graph)
    assert (view.parameter, view.transposed) == ("w", transposed)
    assert (view.bias is not None) == bias
    assert not {"aten.matmul", "aten.mm", "aten.addmm"} & set(ops(graph))
    # The view says what the weight is: (N, K), whatever way it is stored.
    weight = view.weight(module.w)
    expected = X @ weight.T + (module.b if bias else 0)
    (found,) = graph.run({"x": X})
    # A sum of 8 products in two orders.
    bound = 2 * 8 * torch.finfo(torch.float32).eps * (X.abs() @ weight.abs().T + 4)
    assert ((found - expected).abs() <= bound).all()


def test_a_module_that_stores_its_weight_transposed() -> None:
    torch.manual_seed(0)
    graph, _ = run(nn.Sequential(Conv1D(12, 8)), [{"input": X}], Canonicalize())
    (view,) = linears(graph)
    assert (view.name, view.in_features, view.out_features, view.transposed) == ("0", 8, 12, True)


UNTOUCHED = {
    "two activations": (lambda m, x: x @ x.transpose(1, 2), "aten.matmul"),
    "a batch of weights": (lambda m, x: x @ m.e, "aten.bmm"),
    "one batch for several": (lambda m, x: x[None] @ m.e, "aten.matmul"),
    "a vector times a matrix": (lambda m, x: x[0, 0] @ m.w, "aten.matmul"),
    "a buffer": (lambda m, x: x @ m.mix, "aten.matmul"),
    "an expression of a weight": (lambda m, x: x @ (m.w * 2), "aten.matmul"),
    "addmm that scales its product": (lambda m, x: torch.addmm(m.b, flat(x), m.w, alpha=2), "aten.addmm"),
    "addmm that scales its bias": (lambda m, x: torch.addmm(m.b, flat(x), m.w, beta=0.5), "aten.addmm"),
    "addmm that adds an activation": (lambda m, x: torch.addmm(flat(x), flat(x), m.w), "aten.addmm"),
    "addmm that adds a matrix": (lambda m, x: torch.addmm(m.w[:5], flat(x), m.w), "aten.addmm"),
}


@pytest.mark.parametrize("case", UNTOUCHED)
def test_what_only_looks_like_a_linear_stays(case: str) -> None:
    function, op = UNTOUCHED[case]
    graph, _ = run(Forward(function), [{"x": X}], Canonicalize())
    assert list(linears(graph)) == []
    assert op in ops(graph)


def test_casts_and_aliases_without_effect_go() -> None:
    module = Forward(lambda m, x: x.float().detach().to("cpu").to(torch.float32) + m.b.detach())
    assert ops(run(module, [{"x": X}], Canonicalize())[0]) == ["aten.add.Tensor"]


def test_a_cast_with_effect_stays() -> None:
    module = Forward(lambda m, x: x.double() + m.b)
    before = ops(graph_of(module, x=X))
    assert "aten.to.dtype" in before
    assert "aten.to.dtype" in ops(run(module, [{"x": X}], Canonicalize())[0])


def test_equal_expressions_of_weights_become_one() -> None:
    """So that a fold changes each in one place."""
    module = Forward(lambda m, x: x * (1 + m.b) + x * (1 + m.b))
    before = ops(graph_of(module, x=X)).count("aten.add.Tensor")
    after = ops(run(module, [{"x": X}], Canonicalize())[0]).count("aten.add.Tensor")
    assert (before, after) == (3, 2)


def test_expressions_that_differ_stay_apart() -> None:
    module = Forward(lambda m, x: x * (1 + m.b) + x * (2 + m.b))
    assert ops(run(module, [{"x": X}], Canonicalize())[0]).count("aten.add.Tensor") == 3


def test_equal_expressions_of_activations_are_left_alone() -> None:
    module = Forward(lambda m, x: (x + 1) * (x + 1))
    assert ops(run(module, [{"x": X}], Canonicalize())[0]).count("aten.add.Tensor") == 2
