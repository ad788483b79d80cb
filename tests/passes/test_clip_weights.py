"""clip-weights: a grid for every linear, clipped only where held-out tokens agree."""

from __future__ import annotations

import torch

from awqc.context import Context
from awqc.graph import Graph
from awqc.observers.statistics import Statistics
from awqc.passes.clip_weights import ClipWeights
from awqc.passes.round_weights import RoundWeights
from awqc.quantization.grids import Grids
from awqc.quantization.schemes import Schemes
from awqc.quantized import Scheme, minmax_grid
from awqc.report import LinearRow
from tests.passes.experts import STACKS, mixed, original
from tests.passes.graphs import OBSERVED, Look, Mlp, run, samples


def clipped(*before: Look, **options: object) -> tuple[list[Grids], dict[str, LinearRow], Graph]:
    found: list[Grids] = []
    look = Look(lambda g, c: found.append(g.facts[Grids]))
    graph, context = run(
        Mlp(),
        samples(),
        *OBSERVED,
        *before,
        ClipWeights(**options),
        look,
        bits=2,  # type: ignore[arg-type]
    )
    return found, context.report.linears, graph


def test_every_linear_of_the_stage_gets_a_grid() -> None:
    grids, rows, _ = clipped()
    assert [list(g) for g in grids] == [["up.weight"], ["down.weight"]]
    for row in rows.values():
        # Two bits over normally distributed weights: cutting tails pays, and does so on held-out tokens.
        assert row.clipped is not None
        assert 0.05 < row.clipped < 0.5


def test_the_weight_itself_is_not_cut() -> None:
    """So that compensated rounding can still spread what falls outside the grid."""
    _, _, graph = clipped()
    assert graph.weights.changed() == {}


def test_it_lowers_the_final_error() -> None:
    rounding = RoundWeights(method="nearest")
    _, plain = run(Mlp(), samples(), *OBSERVED, rounding, bits=2)
    _, better = run(Mlp(), samples(), *OBSERVED, ClipWeights(), rounding, bits=2)
    errors = [c.report.linears["up.weight"].error or 0 for c in (plain, better)]
    assert errors[1] < 0.9 * errors[0]


def test_a_linear_keeps_its_full_range_where_held_out_tokens_say_so() -> None:
    def only_the_largest(graph: Graph, context: Context) -> None:
        """Held-out tokens see nothing but the columns that clipping cuts most, search tokens all others."""
        assert context.stage is not None
        for observer in context.stage.observers:
            (view,) = observer.linears
            weight = view.weight(graph.weights[view.parameter])
            energy = torch.zeros(weight.shape[1])
            energy[weight.abs().amax(0).topk(3).indices] = 1.0
            statistics = graph.facts[Statistics][observer.node]
            statistics.gram.copy_(torch.diag(1 - energy))
            statistics.held_out.copy_(torch.diag(energy))

    grids, rows, _ = clipped(Look(only_the_largest))
    module = Mlp()
    assert rows["up.weight"].clipped == 0.0
    want = minmax_grid(module.up.weight.detach(), Scheme(2, 16))
    assert torch.equal(grids[0]["up.weight"].scales, want.scales)


def test_a_ladder_of_one_changes_nothing() -> None:
    grids, rows, _ = clipped(shrinks=(1.0,))
    assert all(row.clipped == 0.0 for row in rows.values())
    assert torch.equal(
        grids[1]["down.weight"].scales, minmax_grid(Mlp().down.weight.detach(), Scheme(2, 16)).scales
    )


def test_a_linear_without_a_scheme_is_left_out() -> None:
    def drop(graph: Graph, context: Context) -> None:
        graph.facts[Schemes].pop("up.weight", None)

    grids, rows, _ = clipped(Look(drop))
    assert [list(g) for g in grids] == [[], ["down.weight"]]
    assert rows["up.weight"].clipped is None


def test_schemes_may_differ_by_linear() -> None:
    def eight_bits(graph: Graph, context: Context) -> None:
        graph.facts[Schemes]["down.weight"] = Scheme(8, 16)

    grids, _, _ = clipped(Look(eight_bits))
    assert [g.scheme.bits for stage in grids for g in stage.values()] == [2, 8]


def test_each_expert_has_a_grid_of_its_own() -> None:
    grids: list[Grids] = []
    mixed(*OBSERVED, ClipWeights(), Look(lambda g, c: grids.append(g.facts[Grids])))
    found = {name: grid for stage in grids for name, grid in stage.items()}
    for name in STACKS:
        weight = original(name)
        assert found[name].scales.shape == (*weight.shape[:2], weight.shape[2] // 32)
        full = minmax_grid(weight, Scheme(4, 32))
        kept = (found[name].scales <= full.scales).flatten(1).all(1)
        assert kept.all(), "clipping never widens a range"
        assert (found[name].scales < full.scales).any()
