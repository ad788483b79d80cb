"""find-scale-groups: the fact it provides, its proof by execution, and a rule that is wrong."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from awqc import rules
from awqc.errors import VerifyError
from awqc.passes.canonicalize import Canonicalize
from awqc.passes.find_scale_groups import FindScaleGroups
from awqc.passes.fold_constants import FoldConstants
from awqc.scaleflow.groups import ScaleGroups
from tests.passes.graphs import Mlp, run, samples

BEFORE = (Canonicalize(), FoldConstants())


class Silu(nn.Module):
    """``up`` cannot take the scale of ``down``: silu is not linear. ``norm`` has two readers."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm = nn.RMSNorm(32)
        self.up, self.gate = nn.Linear(32, 32), nn.Linear(32, 32)
        self.down = nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        return x + self.down(torch.nn.functional.silu(self.up(h))) + self.gate(h)


def test_groups_of_a_block_and_their_proof() -> None:
    graph, context = run(Mlp(), samples(1), *BEFORE, FindScaleGroups())
    norm, up = graph.facts[ScaleGroups]
    assert (norm.name, norm.linears, norm.channels) == ("norm.weight", ("up.weight",), 32)
    assert (up.linears, up.channels) == (("down.weight",), 48)
    assert {p.parameter for p in up.producers} == {"up.weight", "up.bias"}
    assert context.report.proof["groups"] == 2
    assert context.report.proof["dtype"] == "float64"
    assert context.report.proof["relative_error"] <= 1e-9
    assert context.report.notes == []


def test_what_no_scale_reaches_is_refused_with_the_reason() -> None:
    graph, _ = run(Silu(), samples(1), *BEFORE, FindScaleGroups())
    (group,) = graph.facts[ScaleGroups]
    assert set(group.linears) == {"up.weight", "gate.weight"}
    (refused,) = graph.facts[ScaleGroups].refusals.items()
    assert refused[0] == "down.weight"
    assert "aten.silu" in refused[1]


def test_a_graph_without_linears_has_no_groups() -> None:
    graph, context = run(
        nn.Sequential(nn.RMSNorm(32)), [{"input": samples(1)[0]["x"]}], *BEFORE, FindScaleGroups()
    )
    assert (graph.facts[ScaleGroups].groups, graph.facts[ScaleGroups].refusals) == ([], {})
    assert context.report.proof["groups"] == 0


def test_a_proof_that_is_left_out_is_noted() -> None:
    _, context = run(Mlp(), samples(1), *BEFORE, FindScaleGroups(proof=False))
    assert context.report.notes == [("find-scale-groups", "the random-scale proof was not run")]


def test_a_wrong_rule_stops_the_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    """The proof runs the graph, so a rule that claims that a scale passes through silu is found out."""

    def passes(op: Any) -> Any:
        return op.value(op.arg(0))

    monkeypatch.setitem(rules._RULES, torch.ops.aten.silu.default, passes)
    with pytest.raises(VerifyError) as caught:
        run(Silu(), samples(1), *BEFORE, FindScaleGroups())
    message = str(caught.value)
    assert message.startswith("folding scale group 'up.weight' changes the model's output by ")
    assert message.endswith(
        " (relative, float64; at most 1e-09 is allowed): a scale rule is wrong; leave the group out and "
        "report the ops aten.linear.default, aten.silu.default"
    )
