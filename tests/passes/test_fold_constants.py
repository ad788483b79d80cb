"""fold-constants: affine expressions of one parameter are sites that a scale can be solved into."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from awqc.graph import Graph
from awqc.passes.canonicalize import Canonicalize
from awqc.passes.find_scale_groups import FindScaleGroups
from awqc.passes.fold_constants import FoldConstants
from awqc.scaleflow.groups import ScaleGroups, random_scales
from awqc.scaleflow.sites import Site, Sites
from tests.passes.graphs import run

X = torch.randn(1, 5, 8, generator=torch.Generator().manual_seed(0))


class Scaled(nn.Module):
    """A linear that reads ``x`` times an expression of the weights ``w`` and ``v``."""

    def __init__(self, expression: Callable[[nn.Module], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.w, self.v = nn.Parameter(torch.randn(8)), nn.Parameter(torch.randn(8))
        self.register_buffer("buffer", torch.randn(8))
        self.out = nn.Linear(8, 8)
        self.expression = expression

    def forward(self, x: Tensor) -> Tensor:
        return self.out(x * self.expression(self)) * 2


def expressions(expression: Callable[[nn.Module], Tensor]) -> tuple[list[Site], Graph]:
    graph, _ = run(Scaled(expression), [{"x": X}], Canonicalize(), FoldConstants())
    return list(graph.facts[Sites].expressions.values()), graph


AFFINE = {
    "1 + w": (lambda m: 1 + m.w, 1.0, 1.0),
    "w + 1": (lambda m: m.w + 1.0, 1.0, 1.0),
    "w - 3": (lambda m: m.w - 3, 1.0, -3.0),
    "3 - w": (lambda m: 3 - m.w, -1.0, 3.0),
    "2 w + 1": (lambda m: 2 * m.w + 1, 2.0, 1.0),
    "2 (w + 1)": (lambda m: 2 * (m.w + 1), 2.0, 2.0),
}


@pytest.mark.parametrize("case", AFFINE)
def test_an_affine_expression_becomes_a_site_that_folds(case: str) -> None:
    expression, factor, offset = AFFINE[case]
    (site,) = expressions(expression)[0]
    assert (site.parameter, site.factor, site.offset) == ("w", factor, offset)
    divisor = torch.linspace(0.25, 4, 8)
    module = Scaled(expression)
    before = expression(module).detach()
    with torch.no_grad():
        module.w.copy_(site.solve(module.w.detach(), divisor))
    found = expression(module).detach()
    # Storing w' loses its rounding, which the offset amplifies relative to a small expression.
    eps = torch.finfo(torch.float32).eps
    bound = 4 * eps * (before.abs() / divisor + abs(offset) + abs(factor) * module.w.detach().abs())
    assert ((found - before / divisor).abs() <= bound).all()


def test_the_graph_keeps_the_expression() -> None:
    """A folded checkpoint is loaded by code that still computes ``1 + w``."""
    _, graph = expressions(lambda m: 1 + m.w)
    assert "aten.add.Tensor(w, 1)" in graph.text()


def test_a_group_over_a_site_folds_exactly() -> None:
    graph, context = run(
        Scaled(lambda m: 1 + m.w), [{"x": X}], Canonicalize(), FoldConstants(), FindScaleGroups()
    )
    (group,) = graph.facts[ScaleGroups]
    assert [p.parameter for p in group.producers] == ["w"]
    assert group.linears == ("out.weight",)
    # The pass has proven it in float64.
    assert context.report.proof["relative_error"] <= 1e-9
    scales = random_scales(group, torch.Generator().manual_seed(0)).float()
    before = graph.weights["w"]
    group.fold(scales, graph.weights)
    assert torch.allclose(1 + graph.weights["w"], (1 + before) / scales, atol=4e-7)


NOT_SITES = {
    "no offset": lambda m: m.w * 2,
    "the weight itself": lambda m: m.w,
    "two parameters": lambda m: m.w + m.v,
    "read twice": lambda m: (1 + m.w) * m.w,
    "not affine": lambda m: 1 + m.w * m.w,
    "nothing left of the parameter": lambda m: 1 + m.w * 0,
    "a buffer, which no checkpoint stores": lambda m: 1 + m.buffer,
    "two scaled by alpha": lambda m: torch.add(m.w, 1, alpha=2),
}


@pytest.mark.parametrize("case", NOT_SITES)
def test_anything_else_is_no_expression_site(case: str) -> None:
    assert expressions(NOT_SITES[case])[0] == []


def test_the_parameter_inside_an_expression_is_no_site_of_its_own() -> None:
    _, graph = expressions(lambda m: 1 + m.w)
    attr = graph.parameters()
    assert graph.facts[Sites].of(attr["w"]) is None
    assert graph.facts[Sites].of(attr["out.weight"]) == Site("out.weight", attr["out.weight"])
