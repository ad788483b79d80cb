"""round-weights: codes on the chosen grid, compensated only where held-out tokens agree."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from transformers.pytorch_utils import Conv1D

from awqc.context import Context
from awqc.graph import Graph
from awqc.observers.statistics import Statistics
from awqc.passes.clip_weights import ClipWeights
from awqc.passes.round_weights import RoundWeights
from awqc.quantization.columns import ColumnGrid
from awqc.quantization.grids import Grids
from awqc.quantization.loss import output_loss
from awqc.quantization.rounding import compensated_codes, feedback, in_place, visiting_order
from awqc.quantization.schemes import Schemes
from awqc.quantized import Grid, Scheme, minmax_grid, quantize
from awqc.report import LinearRow
from tests.mixtures import EXPERTS
from tests.passes.experts import STACKS, mixed, original
from tests.passes.graphs import OBSERVED, Look, Mlp, run, samples

EPS = torch.finfo(torch.float32).eps


def rounded(
    *passes: Any, module: nn.Module | None = None, **options: Any
) -> tuple[Graph, dict[str, LinearRow]]:
    graph, context = run(module or Mlp(), samples(), *OBSERVED, *passes, **{"bits": 3, **options})
    return graph, context.report.linears


def dense(graph: Graph, parameter: str) -> Tensor:
    found = graph.weights.rounded(parameter)
    assert found is not None
    return found.dense()


def test_nearest_is_round_to_nearest() -> None:
    graph, rows = rounded(RoundWeights(method="nearest"))
    for name, module in (("up", Mlp().up), ("down", Mlp().down)):
        want = quantize(module.weight.detach(), Scheme(3, 16))
        found = graph.weights.rounded(f"{name}.weight")
        assert found is not None
        assert torch.equal(found.weight.codes, want.codes)
        assert torch.equal(found.weight.scales, want.scales)
        assert torch.equal(found.weight.zeros, want.zeros)
        assert rows[f"{name}.weight"].rounding == "nearest"
    row = rows["up.weight"]
    assert row.error is not None
    assert row.nearest_error is not None
    assert abs(row.error - row.nearest_error) <= 32 * 32 * EPS * row.error


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_compensation_lowers_the_exact_loss_on_correlated_inputs(bits: int) -> None:
    plain, before = rounded(RoundWeights(method="nearest"), bits=bits)
    better, after = rounded(RoundWeights(), bits=bits)
    batches, module = samples(), Mlp()
    with torch.no_grad():
        x = torch.cat([module.norm(b["x"])[0] for b in batches]).double()

    def loss(graph: Graph) -> float:
        error = dense(graph, "up.weight") - module.up.weight.detach()
        return float((x @ error.double().T).square().sum())

    assert after["up.weight"].rounding == "compensated"
    assert loss(better) < 0.9 * loss(plain)
    assert (after["up.weight"].error or 0) < (before["up.weight"].error or 0)


def test_compensation_is_dropped_where_held_out_tokens_say_so() -> None:
    """Held-out inputs without any correlation: nearest rounding is the best there is for them."""

    def uncorrelated(graph: Graph, context: Context) -> None:
        for statistics in graph.facts[Statistics].values():
            statistics.held_out.copy_(torch.eye(len(statistics.mean_abs)))

    graph, rows = rounded(Look(uncorrelated), RoundWeights())
    assert {row.rounding for row in rows.values()} == {"nearest"}
    want = quantize(Mlp().up.weight.detach(), Scheme(3, 16))
    assert torch.equal(dense(graph, "up.weight"), want.dequantize())


def test_sweeps_of_descent_lower_it_further() -> None:
    def keep_all(graph: Graph, context: Context) -> None:
        """The search tokens as held-out ones: the gate then sees what is optimized."""
        for statistics in graph.facts[Statistics].values():
            statistics.held_out.copy_(statistics.gram)

    _, once = rounded(Look(keep_all), RoundWeights())
    _, swept = rounded(Look(keep_all), RoundWeights(sweeps=2))
    assert (swept["up.weight"].error or 0) < (once["up.weight"].error or 0)


def test_codes_lie_on_the_grid_that_clipping_chose() -> None:
    grids: dict[str, Any] = {}
    look = Look(lambda g, c: grids.update(g.facts[Grids]))
    graph, _ = rounded(ClipWeights(), look, RoundWeights())
    for name, grid in grids.items():
        found = graph.weights.rounded(name)
        assert found is not None
        assert torch.equal(found.weight.scales.float(), grid.scales)
        assert torch.equal(found.weight.zeros.float(), grid.zeros)
    assert set(grids) == {"up.weight", "down.weight"}
    assert Grids not in graph.facts


def test_a_weight_that_is_stored_transposed_is_rounded_along_its_inputs() -> None:
    """``Conv1D`` holds ``(K, N)``."""
    module = Mlp()
    module.up = Conv1D(48, 32)
    module.up.load_state_dict({"weight": Mlp().up.weight.T, "bias": Mlp().up.bias})
    straight, _ = rounded(RoundWeights(method="nearest"))
    graph, _ = rounded(RoundWeights(method="nearest"), module=module)
    found = graph.weights.rounded("up.weight")
    assert found is not None
    assert found.transposed
    assert torch.equal(graph.weights["up.weight"].T, straight.weights["up.weight"])


def test_a_linear_without_a_scheme_stays_in_float() -> None:
    def drop(graph: Graph, context: Context) -> None:
        graph.facts[Schemes].pop("up.weight", None)

    graph, rows = rounded(Look(drop), RoundWeights())
    assert graph.weights.rounded("up.weight") is None
    assert graph.weights.rounded("down.weight") is not None
    assert rows["up.weight"].rounding == ""


def test_readers_of_one_input_may_have_different_schemes() -> None:
    class Readers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.q, self.k, self.v = nn.Linear(32, 32), nn.Linear(32, 16), nn.Linear(32, 32)

        def forward(self, x: Tensor) -> Tensor:
            return x + torch.tanh(self.q(x)) + self.v(x) * self.k(x).sum(-1, keepdim=True)

    def mix(graph: Graph, context: Context) -> None:
        graph.facts[Schemes]["k.weight"] = Scheme(8, -1)

    graph, rows = rounded(Look(mix), RoundWeights(), module=Readers())
    schemes = {name: graph.weights.rounded(f"{name}.weight") for name in "qkv"}
    assert {name: str(r.weight.scheme) for name, r in schemes.items() if r} == {
        "q": "W3 g16 asym",
        "k": "W8 row asym",
        "v": "W3 g16 asym",
    }
    assert rows["k.weight"].scheme == "W8 row asym"
    assert (rows["k.weight"].error or 0) < 0.01 * (rows["q.weight"].error or 0)


def test_each_expert_is_rounded_by_its_own_tokens() -> None:
    """As a linear alone with the statistics of that expert's rows would be."""
    statistics: list[Statistics] = []
    look = Look(lambda g, c: statistics.append(g.facts[Statistics]))
    graph, context = mixed(*OBSERVED, look, RoundWeights())
    for name in STACKS:
        rounded = graph.weights.rounded(name)
        assert rounded is not None
        weight = original(name)
        grid = minmax_grid(weight, Scheme(4, 32))
        assert torch.equal(rounded.weight.scales.float(), grid.scales)
        stage, node = next((s, n) for s in statistics for n in s.by_expert if _reader(s, n) == name)
        for expert in range(EXPERTS):
            own = stage.by_expert[node][expert]
            order = visiting_order(own.gram)
            columns = ColumnGrid.of(_of(grid, expert), order)
            codes = compensated_codes(weight[expert], columns, feedback(own.gram, order), order)
            nearest, compensated = (
                float(output_loss(_of(grid, expert).decode(c) - weight[expert], own.held_out))
                for c in (_of(grid, expert).encode(weight[expert]), in_place(codes, order))
            )
            found = rounded.weight.codes[expert].float()
            if compensated < nearest:
                assert torch.equal(found, in_place(codes, order))
            else:
                assert torch.equal(found, _of(grid, expert).encode(weight[expert]))
        row = context.report.linears[name]
        assert row.error is not None
        assert row.nearest_error is not None
        assert row.error <= row.nearest_error


def _reader(statistics: Statistics, node: fx.Node) -> str:
    return statistics.by_expert[node].view.parameter


def _of(grid: Grid, expert: int) -> Grid:
    return Grid(grid.scales[expert], grid.zeros[expert], grid.scheme, grid.in_features)
