"""search-scales: what wins, what may not win, and that the identity is always in."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from awqc.context import Context
from awqc.graph import Graph
from awqc.observers.statistics import Statistics
from awqc.passes.fold_scales import FoldScales
from awqc.passes.round_weights import RoundWeights
from awqc.passes.search_scales import SearchScales
from awqc.quantization.scales import Scales
from awqc.report import GroupRow
from awqc.scaleflow.groups import ScaleGroups
from awqc.views import expert_linears
from tests.passes.experts import mixed
from tests.passes.graphs import OBSERVED, Look, Mlp, run, samples

#: Channels of the norm that are made large, the columns that read them small.
OUTLIERS = {3: 32.0, 17: 16.0, 30: 8.0}


def outlier_mlp() -> Mlp:
    module = Mlp()
    with torch.no_grad():
        for channel, factor in OUTLIERS.items():
            module.norm.weight[channel] *= factor
            module.up.weight[:, channel] /= factor
    return module


def searched(
    module: nn.Module, batches: list[dict[str, Tensor]], *before: Any, search: SearchScales | None = None
) -> tuple[list[Scales], dict[str, GroupRow], Graph]:
    """Scales by stage, the report's groups, and the graph."""
    found: list[Scales] = []
    look = Look(lambda g, c: found.append(g.facts[Scales]))
    graph, context = run(module, batches, *OBSERVED, *before, search or SearchScales(), look, group_size=32)
    return found, context.report.groups, graph


def test_planted_outliers_get_a_scale() -> None:
    scales, rows, _ = searched(outlier_mlp(), samples())
    row = rows["norm.weight"]
    assert row.gain > 0.5
    assert row.family != "identity"
    assert row.ratio > 0
    assert not row.applied  # that is for fold-scales to say
    chosen = scales[0]["norm.weight"]
    # The large activations are divided by most, so that their small columns become large ones.
    assert set(chosen.topk(3).indices.tolist()) == set(OUTLIERS)


def test_the_scale_lowers_the_final_error() -> None:
    plain = run(outlier_mlp(), samples(), *OBSERVED, RoundWeights(), group_size=32)[1]
    scaled = run(
        outlier_mlp(), samples(), *OBSERVED, SearchScales(), FoldScales(), RoundWeights(), group_size=32
    )[1]
    before, after = (c.report.linears["up.weight"].error for c in (plain, scaled))
    assert after is not None
    assert before is not None
    assert after < 0.5 * before
    # Relative to the same function: the yardstick of the two is one number.
    yardsticks = [c.report.linears["up.weight"].nearest_error for c in (plain, scaled)]
    assert yardsticks[0] == yardsticks[1]


def test_the_identity_is_the_first_candidate_and_the_measure_of_all_others() -> None:
    _, rows, _ = searched(Mlp(), samples())
    for row in rows.values():
        assert row.curve[0] == ("identity", 0.0, 1.0)
        best = min(loss for _, _, loss in row.curve)
        assert best <= 1.0


def test_a_group_in_which_nothing_beats_the_identity_keeps_it() -> None:
    search = SearchScales(families=(), shrinks=(1.0,))
    scales, rows, _ = searched(outlier_mlp(), samples(), search=search)
    assert scales == [{}, {}]
    for row in rows.values():
        assert (row.family, row.ratio, row.gain) == ("identity", 0.0, 0.0)


def test_what_does_not_hold_on_held_out_tokens_is_not_applied() -> None:
    """In the search tokens a few channels carry all the energy, in the held-out ones all the others do:
    finer steps for those few make coarser ones for the rest."""
    module = Mlp()
    with torch.no_grad():
        module.norm.weight[list(OUTLIERS)] *= 32

    def contradict(graph: Graph, context: Context) -> None:
        for statistics in graph.facts[Statistics].values():
            energy = torch.ones(len(statistics.mean_abs))
            energy[list(OUTLIERS)] = 0.0
            statistics.held_out.copy_(torch.diag(energy))

    scales, rows, _ = searched(module, samples(), Look(contradict))
    row = rows["norm.weight"]
    assert min(loss for _, _, loss in row.curve) < 0.9  # the search tokens want it
    assert row.gain < 0
    assert (row.family, row.ratio) == ("identity", 0.0)
    assert "norm.weight" not in scales[0]


def test_tied_channels_share_one_scale() -> None:
    """Each value channel is read by two groups of columns, as under grouped-query attention."""

    class Repeated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.v, self.o = nn.Linear(32, 16), nn.Linear(32, 32)

        def forward(self, x: Tensor) -> Tensor:
            v = self.v(x).repeat_interleave(2, dim=-1)
            return x + self.o(v * torch.linspace(1, 9, 32))

    scales, rows, graph = searched(Repeated(), samples())
    (group,) = graph.facts[ScaleGroups]
    assert group.linears == ("o.weight",)
    assert rows[group.name].channels == 16
    for vector in (s[group.name] for s in scales if group.name in s):
        assert vector.shape == (16,)


def test_channels_that_were_refused_keep_scale_one() -> None:
    """Of a fused gate and up, the rows behind silu cannot be scaled."""

    class Fused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.gate_up, self.down = nn.Linear(32, 64), nn.Linear(32, 32)

        def forward(self, x: Tensor) -> Tensor:
            gate, up = self.gate_up(x).chunk(2, dim=-1)
            return x + self.down(nn.functional.silu(gate) * up)

    module = Fused()
    with torch.no_grad():
        for channel, factor in OUTLIERS.items():
            module.gate_up.weight[32 + channel] *= factor
            module.down.weight[:, channel] /= factor
    scales, rows, graph = searched(module, samples())
    (group,) = [g for g in graph.facts[ScaleGroups] if "down.weight" in g.linears]
    (chosen,) = [s[group.name] for s in scales if group.name in s]
    assert rows[group.name].alive == 32
    assert (chosen[~group.alive] == 1).all()
    assert not (chosen[group.alive] == 1).all()


@pytest.mark.parametrize("family", ["activation", "duo"])
def test_scales_are_normalised_so_that_large_and_small_ones_balance(family: Any) -> None:
    scales, _, _ = searched(outlier_mlp(), samples(), search=SearchScales(families=(family,)))
    chosen = scales[0]["norm.weight"].double()
    # sqrt(max * min) = 1, in a few roundings of float32.
    assert abs((chosen.max() * chosen.min()).sqrt() - 1) <= 8 * torch.finfo(torch.float32).eps


@pytest.mark.parametrize("options", [{"rounding": "compensated"}, {"objective": "block"}])
def test_other_objectives_find_planted_outliers_too(options: dict[str, Any]) -> None:
    _, rows, _ = searched(outlier_mlp(), samples(), search=SearchScales(**options))
    assert rows["norm.weight"].gain > 0.3


def test_the_same_seed_gives_the_same_scales() -> None:
    first, second = (searched(outlier_mlp(), samples())[0] for _ in range(2))
    for a, b in zip(first, second, strict=True):
        assert a.keys() == b.keys()
        assert all(torch.equal(a[name], b[name]) for name in a)


def test_experts_are_searched_together_before_their_first_linears_and_apart_between() -> None:
    chosen: dict[str, Tensor] = {}
    look = Look(lambda g, c: chosen.update(g.facts[Scales]))
    graph, context = mixed(*OBSERVED, SearchScales(), look)
    groups = {group.name: group for group in graph.facts[ScaleGroups]}
    norm = next(group for group in groups.values() if "first" in group.linears)
    assert {"first", "shared.weight", "chooser.weight"} <= set(norm.linears)
    inner = next(group for group in groups.values() if "second" in group.linears)
    row = context.report.groups[inner.name]
    assert row.applied is False
    assert row.gain > 0
    scales = chosen[inner.name]
    view = next(view for view in expert_linears(graph) if view.parameter == "second")
    ids, _ = inner.at_experts(view)
    alone = scales[ids]  # (E, K)
    assert not torch.equal(alone[0], alone[1])
    assert row.curve[0] == ("identity", 0.0, 1.0)
