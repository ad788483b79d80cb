"""scale-inputs: where a multiplier goes, what scale flow makes of it, and that it is off by default."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from awqc.passes.find_scale_groups import FindScaleGroups
from awqc.passes.fold_constants import FoldConstants
from awqc.passes.scale_inputs import ScaleInputs
from awqc.runtime.input_scales import InputScales
from awqc.scaleflow.groups import ScaleGroups
from tests.passes.graphs import Mlp, ops, run, samples

PASSES = (ScaleInputs(), FoldConstants(), FindScaleGroups())
GELU = "aten.gelu (gelu): no scale passes through aten.gelu"


class Gelu(Mlp):
    """norm -> up -> gelu -> down, with a second reader of what the GELU computes."""

    def __init__(self) -> None:
        super().__init__()
        self.side = nn.Linear(48, 32)

    def forward(self, x: Tensor) -> Tensor:
        h = F.gelu(self.up(self.norm(x)))
        return x + self.down(h) * torch.tanh(self.side(h))


def test_one_multiplier_for_all_readers_of_a_tensor() -> None:
    graph, context = run(Gelu(), samples(1), *PASSES, input_scales=True)
    assert ops(graph).count("aten.mul.Tensor") == 2  # the other one is the model's
    assert graph.facts[InputScales] == {"down.weight": GELU, "side.weight": GELU}
    groups = {g.name: g for g in graph.facts[ScaleGroups]}
    assert list(groups) == ["norm.weight", "down.input_scale"]
    assert groups["down.input_scale"].linears == ("down.weight", "side.weight")
    assert [p.parameter for p in groups["down.input_scale"].producers] == ["down.input_scale"]
    assert bool(groups["down.input_scale"].alive.all())
    assert graph.facts[ScaleGroups].refusals == {}
    assert context.report.proof["groups"] == 2
    assert context.report.proof["relative_error"] < 1e-9


def test_a_linear_with_a_group_is_left_alone() -> None:
    graph, _ = run(Mlp(), samples(1), *PASSES, input_scales=True)
    assert graph.facts[InputScales] == {}
    assert "aten.mul.Tensor" not in ops(graph)


def test_it_is_off_by_default() -> None:
    graph, _ = run(Gelu(), samples(1), *PASSES)
    assert graph.facts[InputScales] == {}
    assert graph.facts[ScaleGroups].refusals == {"down.weight": GELU, "side.weight": GELU}


def test_a_weight_that_cannot_be_scaled_gets_no_group_from_it() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.table = nn.Parameter(torch.randn(32, 32))

        def forward(self, x: Tensor) -> Tensor:
            return torch.tanh(F.linear(x, self.table)) + torch.tanh(self.table)[:8]

    graph, _ = run(Tied(), samples(1), *PASSES, input_scales=True)
    assert graph.facts[ScaleGroups].groups == []
    assert list(graph.facts[ScaleGroups].refusals) == ["table"]
