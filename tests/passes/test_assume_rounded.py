"""assume-rounded: codes without values, from shapes alone."""

from __future__ import annotations

import torch

from awqc.passes.assume_rounded import AssumeRounded
from awqc.passes.quantize_linears import QuantizeLinears
from awqc.quantized import Scheme
from awqc.runtime.lowered import QuantizedLinears
from tests.passes.experts import STACKS, mixed
from tests.passes.graphs import ANALYSIS, Mlp, ops, run, samples


def test_every_linear_that_would_be_rounded_gets_codes() -> None:
    graph, context = run(Mlp(), samples(2), *ANALYSIS, AssumeRounded(), QuantizeLinears())
    found = graph.facts[QuantizedLinears]
    assert list(found) == ["up", "down"]
    assert found["up"].codes.device == torch.device("meta")
    assert (found["up"].codes.shape, found["up"].scales.shape) == ((48, 32), (48, 2))
    assert ops(graph).count("awqc.qlinear") == 2
    assert [row.decision for row in context.report.linears.values()] == ["quantized", "quantized"]


def test_linears_that_the_user_keeps_stay() -> None:
    graph, context = run(Mlp(), samples(2), *ANALYSIS, AssumeRounded(), QuantizeLinears(), keep=("up",))
    assert list(graph.facts[QuantizedLinears]) == ["down"]
    assert "up.weight" in graph.parameters()
    assert context.report.linears["up.weight"].decision == "kept"


def test_schemes_that_are_known_decide() -> None:
    """Those of a checkpoint: here one linear in 3 bits, the other in float."""
    known = AssumeRounded({"down": Scheme(3, 24, zero_point=False)})
    graph, context = run(Mlp(), samples(2), *ANALYSIS, known, QuantizeLinears())
    assert {name: str(w.scheme) for name, w in graph.facts[QuantizedLinears].items()} == {
        "down": "W3 g24 sym"
    }
    rows = context.report.linears
    assert (rows["down.weight"].scheme, rows["up.weight"].decision) == ("W3 g24 sym", "kept")


def test_stacks_of_experts() -> None:
    graph, _ = mixed(*ANALYSIS, AssumeRounded(), QuantizeLinears())
    found = graph.facts[QuantizedLinears]
    assert set(STACKS) <= found.keys()
    assert all(found[name].codes.ndim == 3 for name in STACKS)
