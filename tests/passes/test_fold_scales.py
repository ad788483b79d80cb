"""fold-scales: function unchanged, everything computed before follows, and a wrong group is caught."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from awqc.context import Context
from awqc.errors import PipelineError, VerifyError
from awqc.flags import Flags
from awqc.graph import Graph
from awqc.observers.activations import Activations
from awqc.observers.stages import Stages
from awqc.observers.statistics import Statistics
from awqc.passes.clip_weights import ClipWeights
from awqc.passes.fold_scales import FoldScales
from awqc.passes.round_weights import RoundWeights
from awqc.passes.search_scales import SearchScales
from awqc.pipeline import Pipeline
from awqc.quantization.scales import Scales
from awqc.scaleflow.groups import ScaleGroup, ScaleGroups
from tests.mixtures import EXPERTS
from tests.passes.experts import mixed
from tests.passes.graphs import OBSERVED, Look, Mlp, context_of, graph_of, run, samples


def chosen(group: ScaleGroup) -> Tensor:
    """Powers of two, so that a fold rounds nothing."""
    return torch.where(group.alive, torch.exp2(torch.arange(group.channels) % 7 - 3.0), 1.0)


def set_scales(graph: Graph, context: Context) -> None:
    assert context.stage is not None
    graph.facts[Scales] = Scales({group.name: chosen(group) for group in context.stage.groups})


class SetScales(Look):
    """Stands in for the search."""

    name = "set-scales"
    provides = (Scales,)


FOLD = (*OBSERVED, SetScales(set_scales), FoldScales())


def test_producers_are_divided_and_consumers_multiplied() -> None:
    module = Mlp()
    graph, context = run(module, samples(2), *FOLD)
    assert all(row.applied for row in context.report.groups.values())
    norm, up = (chosen(group) for group in graph.facts[ScaleGroups])
    weights = {name: graph.weights[name] for name in graph.parameters()}
    assert torch.equal(weights["norm.weight"], module.norm.weight / norm)
    assert torch.equal(weights["up.weight"], module.up.weight * norm / up[:, None])
    assert torch.equal(weights["up.bias"], module.up.bias / up)
    assert torch.equal(weights["down.weight"], module.down.weight * up)
    assert "down.bias" not in graph.weights.changed()


def test_the_function_does_not_change() -> None:
    module, (batch, *_) = Mlp(), samples(2)
    graph, _ = run(module, samples(2), *FOLD)
    (found,) = graph.run(batch)
    # Powers of two: each product is the same up to its exponent.
    assert torch.equal(found, graph_of(module, **batch).run(batch)[0])


def test_the_model_that_was_given_is_not_touched() -> None:
    module = Mlp()
    before = {name: t.clone() for name, t in module.state_dict().items()}
    run(module, samples(2), *FOLD)
    assert all(torch.equal(t, before[name]) for name, t in module.state_dict().items())


def test_statistics_and_activations_follow() -> None:
    """What is observed again after the fold is what was observed before it, folded."""

    def observe_again(graph: Graph, context: Context) -> None:
        assert context.stage is not None
        again = graph.facts[Activations].observe(context.stage)
        for node, statistics in graph.facts[Statistics].items():
            assert torch.equal(statistics.gram, again[node].gram)
            assert torch.equal(statistics.held_out, again[node].held_out)
            assert torch.equal(statistics.mean_abs, again[node].mean_abs)

    graph, _ = run(Mlp(), samples(9), *FOLD, Look(observe_again))
    assert Scales not in graph.facts


def test_a_group_without_a_choice_is_left_alone() -> None:
    def none(graph: Graph, context: Context) -> None:
        graph.facts[Scales] = Scales()

    graph, context = run(Mlp(), samples(2), *OBSERVED, SetScales(none), FoldScales())
    assert graph.weights.changed() == {}
    assert not any(row.applied for row in context.report.groups.values())


def test_a_producer_that_is_quantized_takes_the_scale_in_its_group_scales() -> None:
    """``up`` is rounded in the first stage and divided in the second, whose group starts from it."""
    rounding = RoundWeights(method="nearest")
    graph, _ = run(Mlp(), samples(2), *FOLD, ClipWeights(), rounding)
    plain, _ = run(Mlp(), samples(2), *OBSERVED, rounding)
    up = [group for group in graph.facts[ScaleGroups] if "down.weight" in group.linears]
    assert [p.parameter for p in up[0].producers if p.parameter.endswith("weight")] == ["up.weight"]
    rounded = graph.weights.rounded("up.weight")
    assert rounded is not None
    assert plain.weights.rounded("up.weight") is not None
    assert torch.equal(graph.weights["up.weight"], rounded.weight.dequantize())


class Routed(nn.Module):
    """A linear that stays in float reads the norm before the one that is quantized does."""

    def __init__(self) -> None:
        super().__init__()
        mlp = Mlp()
        self.norm, self.up, self.down = mlp.norm, mlp.up, mlp.down
        self.router = nn.Linear(32, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        gate = torch.sigmoid(self.router(h))
        return x + self.down(torch.relu(self.up(h))) * gate


def break_columns_of(parameter: str) -> Look:
    """The columns of one consumer in reverse, as a wrong rule for a layout would have them."""

    def flip(graph: Graph, context: Context) -> None:
        for i, group in enumerate(graph.facts[ScaleGroups].groups):
            consumers = [
                replace(c, ids=c.ids.flip(-1)) if c.parameter == parameter else c for c in group.consumers
            ]
            graph.facts[ScaleGroups].groups[i] = replace(group, consumers=tuple(consumers))

    return Break(flip)


class Break(Look):
    name = "break"
    scope = "graph"


@pytest.mark.parametrize(
    ("parameter", "tensor"),
    [
        ("up.weight", "linear_1"),
        ("router.weight", "linear"),
        ("down.weight", "linear_2"),
    ],
)
def test_a_wrong_group_stops_the_compile_and_is_named(parameter: str, tensor: str) -> None:
    """Also where the reader that is wrong is none of the stage's own linears and ran before them."""
    analysis, rest = FOLD[:3], FOLD[3:]
    with pytest.raises(VerifyError) as caught:
        run(Routed(), samples(2), *analysis, break_columns_of(parameter), *rest, keep=("router",))
    message = str(caught.value)
    assert message.startswith(
        f"pass 'fold-scales' promises an equal function but changed tensor {tensor!r} by "
    )
    assert message.endswith("); leave it out with AWQC_SKIP=fold-scales to go on")
    size = float(message.split(" by ")[1].split(" ")[0])
    assert size > 0.1


class Fused(nn.Module):
    """Of a fused gate and up, the rows behind silu cannot be scaled."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.gate_up, self.down = nn.Linear(32, 64), nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return x + self.down(nn.functional.silu(gate) * up)


def test_a_fused_producer_is_folded_in_part() -> None:
    graph, _ = run(Fused(), samples(2), *FOLD)
    (group,) = graph.facts[ScaleGroups]
    changed = graph.weights["gate_up.weight"] != Fused().gate_up.weight
    assert not changed[:32].any()
    assert torch.equal(changed[32:].any(1), chosen(group)[32:] != 1)


def test_a_reader_that_is_no_linear_and_ran_before_the_stage_is_checked() -> None:
    """The gate's rows divided like those of up: silu notices, which no linear sees before it is run again."""

    def divide_the_gate_too(graph: Graph, context: Context) -> None:
        (group,) = graph.facts[ScaleGroups]
        wrong = [replace(p, ids=torch.where(p.ids < 0, p.ids.roll(32, 0), p.ids)) for p in group.producers]
        graph.facts[ScaleGroups].groups[0] = replace(group, producers=tuple(wrong))

    with pytest.raises(VerifyError, match=r"^pass 'fold-scales' promises .* but changed tensor 'silu' by "):
        run(Fused(), samples(2), *FOLD[:3], Break(divide_the_gate_too), *FOLD[3:])


def test_a_wrong_group_goes_unnoticed_without_checks() -> None:
    """So the test above is about the check, and ``AWQC_CHECK=0`` turns off that and nothing else."""
    batches = samples(2)
    graph, context = graph_of(Mlp(), **batches[0]), context_of(batches)
    Pipeline((*FOLD[:3], break_columns_of("up.weight"), *FOLD[3:])).run(graph, context, Flags(check=False))
    (found,), (want,) = graph.run(batches[0]), graph_of(Mlp(), **batches[0]).run(batches[0])
    assert (found - want).norm() > 0.1 * want.norm()


def test_it_cannot_come_before_a_search() -> None:
    pipeline = Pipeline((*OBSERVED, FoldScales(), SetScales(set_scales)))
    with pytest.raises(PipelineError) as caught:
        pipeline.check_order()
    assert str(caught.value) == "'fold-scales' requires Scales, provided by 'set-scales': move it earlier"


def test_stages_are_the_unit_of_work() -> None:
    """The scales of a later stage do not reach an earlier one."""
    seen: list[set[str]] = []

    def changed(graph: Graph, context: Context) -> None:
        seen.append(set(graph.weights.changed()))

    graph, _ = run(Mlp(), samples(2), *FOLD, Look(changed))
    assert seen[0] == {"norm.weight", "up.weight"}
    assert seen[1] == {"norm.weight", "up.weight", "up.bias", "down.weight"}
    assert len(list(graph.facts[Stages])) == 2


def test_a_fold_between_the_linears_of_experts_is_followed() -> None:
    """Values and statistics that are there when a scale is folded, rows by the expert that serves them."""
    seen: list[tuple[Statistics, Statistics]] = []

    def see(graph: Graph, context: Context) -> None:
        assert context.stage is not None
        seen.append((graph.facts[Statistics], graph.facts[Activations].observe(context.stage)))

    _, context = mixed(*OBSERVED, SearchScales(), FoldScales(), Look(see))
    assert sum(row.applied for row in context.report.groups.values()) == 2
    assert sum(len(followed.by_expert) for followed, _ in seen) == 2
    for followed, again in seen:
        for node, by_expert in followed.by_expert.items():
            for expert in range(EXPERTS):
                found, expected = by_expert[expert], again.by_expert[node][expert]
                # Sums of some hundred rows, whose values were each divided once.
                eps = 512 * torch.finfo(torch.float32).eps
                assert (found.gram - expected.gram).norm() <= eps * expected.gram.norm()
                assert (found.mean_abs - expected.mean_abs).norm() <= eps * expected.mean_abs.norm()
