"""calibrate: statistics of the stage's activations, and the yardstick in the report."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from awqc.observers.statistics import Statistics
from awqc.passes.calibrate import Calibrate
from awqc.passes.round_weights import RoundWeights
from awqc.quantized import Scheme, quantize
from tests.passes.graphs import ANALYSIS, OBSERVED, Look, Mlp, run, samples


def test_statistics_of_every_activation_of_the_stage_and_no_other() -> None:
    seen: list[Statistics] = []
    run(Mlp(), samples(4), *OBSERVED, Look(lambda g, c: seen.append(g.facts[Statistics])))
    up, down = seen
    (first,), (second,) = up.values(), down.values()
    assert first.gram.shape == first.held_out.shape == (32, 32)
    assert second.gram.shape == (48, 48)
    assert list(up) != list(down)


def test_the_report_counts_the_tokens_behind_each_decision() -> None:
    _, context = run(Mlp(), samples(16, tokens=8), *OBSERVED)
    for row in context.report.groups.values():
        assert (row.tokens, row.held_out_tokens) == (14 * 8, 2 * 8)


def test_the_yardstick_is_the_output_error_of_round_to_nearest_on_held_out_tokens() -> None:
    batches = samples(8)
    _, context = run(Mlp(), batches, *OBSERVED)
    module = Mlp()
    with torch.no_grad():
        x = module.norm(batches[7]["x"])[0].double()
    weight = module.up.weight.detach()
    error = quantize(weight, Scheme(4, 16)).dequantize() - weight
    want = float((x @ error.double().T).square().sum() / (x @ weight.double().T).square().sum())
    found = context.report.linears["up.weight"].nearest_error
    # The Gram matrix and the trace are sums in float32, of 32 x 32 terms a row.
    assert found is not None
    assert abs(found - want) <= 32 * torch.finfo(torch.float32).eps * want * 32


def test_an_input_that_is_always_zero_makes_no_error() -> None:
    class Zero(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(16, 16), nn.Linear(16, 16)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.down(self.up(x * 0))

    _, context = run(Zero(), samples(4, width=16), *ANALYSIS, Calibrate(), RoundWeights())
    row = context.report.linears["up.weight"]
    assert (row.nearest_error, row.error) == (0.0, 0.0)
