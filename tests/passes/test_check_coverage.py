"""check-coverage: the share of parameters in scale groups, what is no linear, and when it is too little."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from awqc.errors import ConfigError
from awqc.passes.check_coverage import CheckCoverage
from tests.passes.graphs import ANALYSIS, Mlp, run, samples

PASSES = (*ANALYSIS, CheckCoverage())


class Blocks(nn.Module):
    """Two blocks whose ``down`` follows a GELU, so that half of their parameters have no group."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(
            nn.ModuleDict({"norm": nn.LayerNorm(32), "up": nn.Linear(32, 48), "down": nn.Linear(48, 32)})
            for _ in range(2)
        )

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block["down"](F.gelu(block["up"](block["norm"](x))))
        return x


class Products(Mlp):
    """Besides the linears of :class:`Mlp`, weights that are applied in ways of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.pairs = nn.Parameter(torch.randn(4, 32, 32) / 6)
        self.table = nn.Parameter(torch.randn(8, 32))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + torch.einsum("btk,hkn->btn", x, self.pairs) + self.table


def test_the_share_is_one_of_parameters() -> None:
    assert run(Mlp(), samples(1), *PASSES)[1].report.coverage == 1.0
    assert run(Blocks(), samples(1), *PASSES)[1].report.coverage == 0.5
    # Without two of four linears, of 32 x 48 each, one of the two that are left has a group.
    assert run(Blocks(), samples(1), *PASSES, keep=("blocks.0.*",))[1].report.coverage == 0.5
    assert run(Blocks(), samples(1), *PASSES, keep=("*.down",))[1].report.coverage == 1.0


def test_too_little_stops_with_the_largest_and_their_reasons() -> None:
    with pytest.raises(ConfigError) as error:
        run(Blocks(), samples(1), *PASSES, require_coverage=0.9)
    assert str(error.value) == (
        "scale groups cover 50.0% of the parameters to be quantized, less than require_coverage=0.9; without "
        "one are 2 'blocks.*.down' (aten.gelu (gelu): no scale passes through aten.gelu); lower "
        "require_coverage, or keep such linears in float"
    )


def test_exactly_what_is_required_is_enough() -> None:
    assert run(Blocks(), samples(1), *PASSES, require_coverage=0.5)[1].report.coverage == 0.5


def test_a_product_that_is_no_linear_is_in_the_notes() -> None:
    notes = run(Products(), samples(1), *PASSES)[1].report.notes
    assert [what for where, what in notes if where == "check-coverage"] == [
        "'pairs' stays in float: aten.einsum reads it as no linear does"
    ]


def test_a_module_that_is_called_as_it_is_counts_as_a_product() -> None:
    class Branch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.matrix = nn.Parameter(torch.eye(32))

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.matrix if x.sum() > 0 else x

    class Outer(Mlp):
        def __init__(self) -> None:
            super().__init__()
            self.branch = Branch()

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(self.branch(x))

    notes = run(Outer(), samples(1), *PASSES)[1].report.notes
    assert [what for where, what in notes if where == "check-coverage"] == [
        "'branch.matrix' stays in float: Branch reads it as no linear does"
    ]
