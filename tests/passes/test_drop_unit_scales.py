"""drop-unit-scales: what stays, what is taken back, and what the report says of each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from awqc.capture import relative_error
from awqc.context import Context
from awqc.graph import Graph
from awqc.passes.calibrate import Calibrate
from awqc.passes.drop_unit_scales import DropUnitScales
from awqc.passes.find_scale_groups import FindScaleGroups
from awqc.passes.fold_constants import FoldConstants
from awqc.passes.fold_scales import FoldScales
from awqc.passes.insert_observers import InsertObservers
from awqc.passes.round_weights import RoundWeights
from awqc.passes.scale_inputs import ScaleInputs
from awqc.pipeline import Pass
from awqc.quantization.scales import Scales
from awqc.runtime.input_scales import input_scale
from awqc.views import linears
from tests.passes.graphs import Mlp, run, samples

GELU = "aten.gelu (gelu): no scale passes through aten.gelu"


class Gelu(Mlp):
    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.gelu(self.up(self.norm(x))))


class Readers(Mlp):
    """Two linears read what the GELU computes."""

    def __init__(self) -> None:
        super().__init__()
        self.side = nn.Linear(48, 32)

    def forward(self, x: Tensor) -> Tensor:
        h = F.gelu(self.up(self.norm(x)))
        return x + self.down(h) * torch.tanh(self.side(h))


@dataclass(frozen=True)
class Choose(Pass):
    """In the place of the search: the same scale for all channels of every group."""

    name: ClassVar[str] = "choose"
    scope: ClassVar = "stage"
    provides: ClassVar[tuple[type, ...]] = (Scales,)

    scale: float = 2.0

    def run(self, graph: Graph, context: Context) -> None:
        assert context.stage is not None
        graph.facts[Scales] = Scales(
            {group.name: torch.full((group.channels,), self.scale) for group in context.stage.groups}
        )


def compiled(module: nn.Module, *last: Pass, scale: float = 2.0, **options: object) -> tuple[Graph, Context]:
    passes = (
        *(ScaleInputs(), FoldConstants(), FindScaleGroups(), InsertObservers()),
        *(Calibrate(), Choose(scale), FoldScales(), RoundWeights(method="nearest")),
    )
    return run(module, samples(4), *passes, *last, input_scales=True, **options)


def scaled(graph: Graph) -> list[str]:
    return [view.name for view in linears(graph) if input_scale(view.x) is not None]


def test_a_scale_that_was_applied_stays_and_is_reported() -> None:
    graph, context = compiled(Gelu(), DropUnitScales())
    assert scaled(graph) == ["down"]
    assert torch.equal(graph.weights["down.input_scale"], torch.full((48,), 0.5))
    row = context.report.linears["down.weight"]
    assert (row.group, row.no_group) == ("down.input_scale", GELU)


def test_a_scale_of_one_is_taken_back() -> None:
    graph, context = compiled(Gelu(), DropUnitScales(), scale=1.0)
    assert scaled(graph) == []
    assert not any(str(name).endswith("input_scale") for name in graph.parameters())
    row = context.report.linears["down.weight"]
    assert (row.group, row.no_group) == (None, GELU)
    assert list(context.report.groups) == ["norm.weight"]


def test_a_linear_in_float_gets_its_weight_back() -> None:
    """It shares the multiplier of one that is quantized, so its weight was scaled along."""
    module = Readers()
    before, _ = compiled(module, keep=("side",))
    assert torch.equal(before.weights["side.weight"], 2 * module.side.weight)
    graph, context = compiled(module, DropUnitScales(), keep=("side",))
    assert scaled(graph) == ["down"]
    assert torch.equal(graph.weights["side.weight"], module.side.weight)  # by two, and by a half
    row = context.report.linears["side.weight"]
    assert (row.decision, row.group, row.no_group) == ("kept", None, GELU)
    assert context.report.groups["down.input_scale"].linears == ["down"]


@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_the_function_is_the_same_before_and_after(scale: float) -> None:
    before, _ = compiled(Gelu(), scale=scale)
    after, _ = compiled(Gelu(), DropUnitScales(), scale=scale)
    batch = samples(4)[0]
    assert relative_error(after.run(batch)[0], before.run(batch)[0]) < 1e-6
