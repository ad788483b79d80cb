"""insert-observers: what is observed, what is quantized and how, and where stages begin."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from awqc.errors import ConfigError
from awqc.observers.stages import Observers, Stages
from awqc.quantization.schemes import Schemes
from awqc.quantized import Scheme
from tests.passes.experts import STACKS, mixed
from tests.passes.graphs import ANALYSIS, Mlp, run, samples


class Model(nn.Module):
    """Attention-like readers of one norm, an MLP, and a head that shares its weight with ``embed``."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.norm = nn.Linear(32, 48, bias=False), nn.RMSNorm(32)
        self.q, self.k = nn.Linear(32, 32), nn.Linear(32, 32)
        self.out, self.head = nn.Linear(32, 32), nn.Linear(32, 48, bias=False)
        self.tied = nn.Linear(32, 48, bias=False)
        self.tied.weight = self.embed.weight

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.norm(x)
        h = x + self.out(torch.tanh(self.q(h)) * self.k(h))
        return self.head(h), torch.nn.functional.linear(h, self.embed.weight * 2) + self.tied(h)


def test_one_observer_for_all_readers_of_an_activation() -> None:
    graph, _ = run(Model(), samples(1), *ANALYSIS)
    assert [[v.name for v in o.linears] for o in graph.facts[Observers]] == [["q", "k"], ["out"]]
    assert [o.group.name if o.group else None for o in graph.facts[Observers]] == ["norm.weight", "k.weight"]


def test_what_is_kept_and_why() -> None:
    _, context = run(Model(), samples(1), *ANALYSIS, keep=("o*",))
    assert {r.name: (r.decision, r.reason) for r in context.report.linears.values()} == {
        "q": ("quantized", ""),
        "k": ("quantized", ""),
        "out": ("kept", "matches keep pattern 'o*'"),
        "head": ("kept", "computes the model's output (quantize_head=True quantizes it)"),
        "embed": ("kept", "its weight is also read by mul_1, so it must stay in float"),
    }


def test_a_stored_transpose_that_is_read_twice_is_kept() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.shared, self.other = Conv1D(32, 32), nn.Linear(32, 32)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.shared(torch.tanh(self.shared(x))) + self.other(x)

    _, context = run(Twice(), samples(1), *ANALYSIS)
    row = context.report.linears["shared.weight"]
    assert row.decision == "kept"
    assert row.reason == "its weight is also read by linear_default, so it must stay in float"


def test_a_weight_that_belongs_to_no_module_of_its_own_is_kept() -> None:
    """Nothing could be put in its place."""

    class Bare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.projection, self.other = nn.Parameter(torch.randn(32, 32)), nn.Linear(32, 32)

        def forward(self, x: Tensor) -> Tensor:
            return x + x @ self.projection + self.other(x)

    _, context = run(Bare(), samples(1), *ANALYSIS)
    row = context.report.linears["projection"]
    assert (row.decision, row.reason) == (
        "kept",
        "its weight is a parameter of its own, not that of a module that could be replaced",
    )


def test_the_head_is_quantized_when_asked_for() -> None:
    graph, context = run(Model(), samples(1), *ANALYSIS, quantize_head=True)
    assert context.report.linears["head.weight"].decision == "quantized"
    assert "head.weight" in graph.facts[Schemes]


def test_schemes_are_those_of_the_config_and_only_for_what_is_quantized() -> None:
    graph, context = run(Mlp(), samples(1), *ANALYSIS, bits=3, zero_point=False, keep=("down",))
    assert graph.facts[Schemes] == {"up.weight": Scheme(3, 16, False)}
    assert context.report.linears["up.weight"].scheme == "W3 g16 sym"
    assert context.report.linears["down.weight"].scheme == ""


def test_stages_tile_the_graph_from_the_first_linear_on() -> None:
    graph, _ = run(Model(), samples(1), *ANALYSIS)
    stages = list(graph.facts[Stages])
    order, nodes = graph.order(), graph.nodes
    assert [s.index for s in stages] == [0, 1]
    assert [nodes[s.start].target for s in stages] == [torch.ops.aten.linear.default] * 2
    assert stages[0].end == stages[1].start
    assert stages[-1].end == order[graph.output]
    for stage in stages:
        assert all(stage.start <= order[v.node] < stage.end for v in stage.linears)
        # What is observed exists when the stage begins.
        assert all(order[o.node] < stage.start for o in stage.observers)


def test_all_linears_kept_is_a_mistake() -> None:
    with pytest.raises(ConfigError) as caught:
        run(Mlp(), samples(1), *ANALYSIS, keep=("*",))
    assert str(caught.value) == (
        "nothing to quantize: all 2 linears stay in float, such as 'up': matches keep pattern '*'"
    )


def test_a_model_without_linears() -> None:
    with pytest.raises(ConfigError) as caught:
        run(nn.Sequential(nn.RMSNorm(32)), [{"input": samples(1)[0]["x"]}], *ANALYSIS)
    assert str(caught.value) == "nothing to quantize: the graph holds no linear over a parameter"


def test_a_group_size_that_divides_nothing() -> None:
    with pytest.raises(ConfigError) as caught:
        run(Mlp(width=64, hidden=96), samples(1, width=64), *ANALYSIS, group_size=60)
    assert str(caught.value) == (
        "group_size=60 divides the input width of none of the 2 linears (64, 96): use 32, 64, -1 (whole rows)"
    )


def test_a_group_size_that_divides_some_leaves_ragged_groups_in_the_others() -> None:
    graph, _ = run(Mlp(width=32, hidden=48), samples(1), *ANALYSIS, group_size=32)
    assert {s.group_size for s in graph.facts[Schemes].values()} == {32}


def test_experts_are_observed_by_their_rows_and_routers_stay_in_float() -> None:
    graph, context = mixed(*ANALYSIS)
    first, second = (o for o in graph.facts[Observers] if o.stacks)
    assert [view.parameter for view in (*first.stacks, *second.stacks)] == list(STACKS)
    assert not first.linears
    rows = context.report.linears
    assert rows["chooser.weight"].decision == "kept"
    assert rows["chooser.weight"].reason == "decides which experts of first a token goes to"
    assert (rows["first"].out_features, rows["first"].in_features, rows["first"].expert_count) == (64, 32, 4)
    # One scale for all readers of the norm: one stage.
    shared = next(o for o in graph.facts[Observers] if "shared.weight" in [v.parameter for v in o.linears])
    assert first.group is shared.group
    stage = next(stage for stage in graph.facts[Stages] if first in stage.observers)
    assert shared in stage.observers


def test_a_linear_with_one_output_stays_in_float() -> None:
    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate, self.inner = nn.Linear(32, 1), nn.Linear(32, 32)

        def forward(self, x: Tensor) -> Tensor:
            return x + torch.sigmoid(self.gate(x)) * self.inner(x)

    _, context = run(Gated(), samples(1), *ANALYSIS)
    row = context.report.linears["gate.weight"]
    assert (row.decision, row.reason) == ("kept", "has a single output: nothing to gain")
    assert context.report.linears["inner.weight"].decision == "quantized"


def test_what_is_computed_from_one_linear_alone_is_the_model_output() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.head = nn.Linear(32, 32), nn.Linear(32, 48)

        def forward(self, x: Tensor) -> Tensor:
            return torch.tanh(self.head(x + self.inner(x)) / 8) * 30

    _, context = run(Scaled(), samples(1), *ANALYSIS)
    assert context.report.linears["head.weight"].reason.startswith("computes the model's output")
    assert context.report.linears["inner.weight"].decision == "quantized"
