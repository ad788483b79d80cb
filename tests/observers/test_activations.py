"""Calibration by stages: exact statistics, tokens that move once, and what they see on the way."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from awqc.context import Context
from awqc.errors import NonFiniteError
from awqc.graph import Graph
from awqc.observers.activations import Activations
from awqc.observers.input_statistics import HELD_OUT_EVERY, InputStatistics
from awqc.observers.stages import Stages
from awqc.observers.statistics import Statistics
from awqc.passes.calibrate import Calibrate
from awqc.passes.round_weights import RoundWeights
from awqc.pipeline import Pipeline
from awqc.program import Program
from awqc.quantization.schemes import Schemes
from awqc.scaleflow.groups import ScaleGroups
from tests.passes.graphs import ANALYSIS, OBSERVED, Look, Mlp, context_of, graph_of, run, samples

EPS = torch.finfo(torch.float32).eps


def exact(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Gram matrix of ``rows`` ``(tokens, K)`` in float64, and how far a float32 sum may be from it."""
    rows = rows.double()
    return rows.T @ rows, EPS * len(rows) * (rows.abs().T @ rows.abs())


@pytest.mark.parametrize("width", [1, 7, 64, 1026])
def test_the_gram_matrix_is_the_sum_over_all_tokens(width: int) -> None:
    """1026 columns take the path that computes only the upper block triangle."""
    x = torch.randn(24, width, generator=torch.Generator().manual_seed(width))
    statistics = InputStatistics.empty(width, torch.device("cpu"))
    for rows in x[:18].split(5):
        statistics.add(rows, held_out=False)
    statistics.add(x[18:], held_out=True)
    statistics.finish()
    for gram, rows in ((statistics.gram, x[:18]), (statistics.held_out, x[18:])):
        want, bound = exact(rows)
        assert ((gram - want).abs() <= bound).all()
        assert torch.equal(gram, gram.T)
    assert ((statistics.mean_abs - x[:18].double().abs().mean(0)).abs() <= 18 * EPS * x.abs().amax(0)).all()
    assert (statistics.tokens, statistics.held_out_tokens) == (18, 6)


def test_statistics_of_half_precision_activations_are_summed_in_float32() -> None:
    statistics = InputStatistics.empty(1, torch.device("cpu"))
    # 512 * 512 is beyond float16, and so is a sum of 4096 ones for bfloat16.
    statistics.add(torch.ones(4096, 1, dtype=torch.bfloat16), held_out=False)
    statistics.add(torch.full((4096, 1), 512.0, dtype=torch.float16), held_out=False)
    statistics.finish()
    assert statistics.gram.item() == 4096 * (512**2 + 1)


def test_folding_statistics_is_what_folding_the_activations_gives() -> None:
    x = torch.randn(32, 16, generator=torch.Generator().manual_seed(0))
    scales = torch.exp2(torch.randint(-3, 4, (16,), generator=torch.Generator().manual_seed(1)).float())
    folded, direct = (InputStatistics.empty(16, torch.device("cpu")) for _ in range(2))
    for statistics, rows in ((folded, x), (direct, x / scales)):
        statistics.add(rows[:24], held_out=False)
        statistics.add(rows[24:], held_out=True)
        statistics.finish()
    folded.fold(scales)
    # Powers of two: not one bit may differ.
    assert torch.equal(folded.gram, direct.gram)
    assert torch.equal(folded.held_out, direct.held_out)
    assert torch.equal(folded.mean_abs, direct.mean_abs)


def observed(module: nn.Module, batches: list[dict[str, Tensor]]) -> Statistics:
    """Statistics of the first stage."""
    seen: list[Statistics] = []
    run(module, batches, *OBSERVED, Look(lambda g, c: seen.append(g.facts[Statistics])))
    return seen[0]


def normed(batches: list[dict[str, Tensor]]) -> list[Tensor]:
    with torch.no_grad():
        return [Mlp().norm(b["x"])[0] for b in batches]


@pytest.mark.parametrize("count", [2, 3, 8, 17])
def test_every_eighth_sample_is_held_out(count: int) -> None:
    batches = samples(count)
    (found,) = observed(Mlp(), batches).values()
    every = min(HELD_OUT_EVERY, count)
    rows = normed(batches)
    groups = {
        "gram": [r for i, r in enumerate(rows) if i % every != every - 1],
        "held_out": [r for i, r in enumerate(rows) if i % every == every - 1],
    }
    assert found.tokens == 8 * len(groups["gram"])
    assert found.held_out_tokens == 8 * len(groups["held_out"]) > 0
    for name, members in groups.items():
        want, bound = exact(torch.cat(members))
        # The norm itself is computed by another kernel than the module's: a few roundings of x.
        assert ((getattr(found, name) - want).abs() <= bound + 16 * EPS * want.diagonal().max()).all()


def test_a_lone_sample_gives_up_its_last_tokens() -> None:
    batches = samples(1, tokens=16)
    (found,) = observed(Mlp(), batches).values()
    assert (found.tokens, found.held_out_tokens) == (14, 2)
    want, bound = exact(normed(batches)[0][14:])
    assert ((found.held_out - want).abs() <= bound + 16 * EPS * want.diagonal().max()).all()


def test_a_lone_token_is_searched_on_and_held_out() -> None:
    (found,) = observed(Mlp(), samples(1, tokens=1)).values()
    assert (found.tokens, found.held_out_tokens) == (1, 1)


class TwoBlocks(nn.Module):
    """Two blocks on a residual, with a mask that depends on no input."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Mlp(seed=0), Mlp(seed=1)

    def forward(self, x: Tensor) -> Tensor:
        mask = torch.arange(x.shape[1]).float().cos()[:, None]
        return self.second(self.first(x) * mask) + 1


def test_every_op_runs_once_for_every_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    batches = samples(3)
    graph, context = graph_of(TwoBlocks(), **batches[0]), context_of(batches)
    Pipeline(ANALYSIS).run(graph, context)
    runs: Counter[str] = Counter()

    def counted(self: Program, *args: Any, **kwargs: Any) -> None:
        runs.update(step.node.name for step in self._steps)
        run(self, *args, **kwargs)

    run = Program.run
    monkeypatch.setattr(Program, "run", counted)
    activations = Activations(graph, graph.facts[Stages], context)
    for stage in graph.facts[Stages]:
        activations.observe(stage)
        activations.advance(stage)
        activations.advance(stage)  # a second call does nothing
    last = list(graph.facts[Stages])[-1]
    for position, node in enumerate(graph.nodes):
        if node.op != "call_function" or position >= last.start:
            continue  # what follows the last linear's input is never needed
        expected = 1 if not _depends_on_input(node) else 3
        assert runs[node.name] == expected, node.name


def _depends_on_input(node: fx.Node) -> bool:
    return node.op == "placeholder" or any(_depends_on_input(n) for n in node.all_input_nodes)


def test_only_live_values_are_kept() -> None:
    batches = samples(3)
    graph, context = graph_of(TwoBlocks(), **batches[0]), context_of(batches)
    Pipeline(ANALYSIS).run(graph, context)
    activations = Activations(graph, graph.facts[Stages], context)
    nodes = graph.nodes
    for stage in graph.facts[Stages]:
        for sample in activations.samples:
            for node in sample:
                assert any(nodes.index(user) >= stage.start for user in node.users)
        activations.advance(stage)


@pytest.mark.parametrize("propagate", ["quantized", "float"])
def test_what_later_stages_see(propagate: str) -> None:
    """The outputs of the quantized stages before them, or those of the float model."""
    batches, seen = samples(2), list[Statistics]()
    rounding = RoundWeights(method="nearest")
    look = Look(lambda g, c: seen.append(g.facts[Statistics]))
    graph, _ = run(Mlp(), batches, *OBSERVED, look, rounding, bits=2, propagate=propagate)
    module = Mlp()
    if propagate == "quantized":
        up = graph.weights.rounded("up.weight")
        assert up is not None
        module.up.weight.data.copy_(up.dense())
    with torch.no_grad():
        rows = torch.relu(module.up(module.norm(batches[0]["x"])))[0]
    (found,) = seen[1].values()
    want, bound = exact(rows)
    assert ((found.gram - want).abs() <= bound + 64 * EPS * want.diagonal().max()).all()
    # The two differ by far more than that at 2 bits, so that the test can fail.
    with torch.no_grad():
        other = exact(torch.relu(Mlp().up(Mlp().norm(batches[0]["x"])))[0])[0]
    assert ((found.gram - other).abs().max() > 0.01 * other.max()) == (propagate == "quantized")


def test_a_fold_divides_the_values_that_are_on_their_way() -> None:
    """What a new start with the folded weights would compute."""
    batches = samples(2)
    graph, context = graph_of(Mlp(), **batches[0]), context_of(batches)
    Pipeline(ANALYSIS).run(graph, context)
    stage = next(iter(graph.facts[Stages]))
    group = next(iter(graph.facts[ScaleGroups]))
    activations = Activations(graph, graph.facts[Stages], context)
    node = stage.observers[0].node
    before = [activations.evaluate([node], sample)[node] for sample in activations.samples]
    scales = torch.exp2(torch.arange(32) % 5 - 2.0)
    group.fold(scales, graph.weights)
    activations.fold(group, scales)
    again = Activations(graph, graph.facts[Stages], context)
    for old, moved, fresh in zip(before, activations.samples, again.samples, strict=True):
        assert torch.equal(activations.evaluate([node], moved)[node], old / scales)
        assert torch.equal(again.evaluate([node], fresh)[node], old / scales)


class Fragile(nn.Module):
    """Its logarithm is NaN below zero and -Inf at zero; what comes before it can overflow."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.up((x * 1e30).log()))


CASES = {"NaN": (-1.0, "aten.log (log)"), "-Inf": (0.0, "aten.log (log)"), "Inf": (1e20, "aten.mul (mul)")}


@pytest.mark.parametrize("where", [0, 3, 7])  # sample 7 is held out
@pytest.mark.parametrize("case", CASES)
def test_activations_that_are_not_finite(case: str, where: int) -> None:
    value, op = CASES[case]
    batches = [{"x": torch.rand(1, 4, 16) + 1} for _ in range(8)]
    batches[where]["x"][0, 2, 5] = value
    graph, context = graph_of(Fragile(), **batches[1]), context_of(batches)
    Pipeline(ANALYSIS).run(graph, Context(context.config, batches[1:2]))
    with pytest.raises(NonFiniteError) as caught:
        Activations(graph, graph.facts[Stages], context).observe(next(iter(graph.facts[Stages])))
    assert str(caught.value) == (
        f"calibration sample {where} makes 'log', the input of 'up', NaN or Inf; the first op to do so is "
        f"{op}: check the weights it reads, or leave the sample out"
    )


def test_of_samples_that_move_together_all_are_named() -> None:
    batches = [{"x": torch.rand(2, 4, 16) + 1} for _ in range(8)]
    batches[5]["x"][1, 2, 5] = -1.0
    graph, context = graph_of(Fragile(), **batches[1]), context_of(batches)
    Pipeline(ANALYSIS).run(graph, Context(context.config, batches[1:2]))
    context.rows = 2
    with pytest.raises(NonFiniteError, match="calibration sample 5 or 13 makes 'log'"):
        Activations(graph, graph.facts[Stages], context).observe(next(iter(graph.facts[Stages])))


def test_masks_may_hold_minus_infinity() -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(16, 16), nn.Linear(16, 16)

        def forward(self, x: Tensor) -> Tensor:
            mask = torch.full((4, 16), float("-inf")).triu(1)
            return x + self.down(self.up((x + mask).softmax(-1)))

    batches = [{"x": torch.rand(1, 4, 16)} for _ in range(2)]
    run(Masked(), batches, *ANALYSIS, Calibrate(), RoundWeights())


def test_values_too_large_to_square() -> None:
    batches = [{"x": torch.full((1, 4, 16), 1e25)} for _ in range(2)]
    module = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16), nn.ReLU())
    with pytest.raises(NonFiniteError) as caught:
        run(module, [{"input": b["x"]} for b in batches], *OBSERVED)
    assert str(caught.value) == (
        "the values of 'input_1', the input of '0', are too large to square in float32: check the weights "
        "before it"
    )


def test_linears_that_a_pass_takes_out_of_the_schemes_stay_in_float() -> None:
    def drop(graph: Graph, context: Context) -> None:
        graph.facts[Schemes].pop("up.weight", None)

    graph, _ = run(Mlp(), samples(2), *ANALYSIS, Look(drop), Calibrate(), RoundWeights())
    assert graph.weights.rounded("up.weight") is None
    assert graph.weights.rounded("down.weight") is not None
