"""lower: the backend's op on its packed weights, the reference where it refuses, and the reasons."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from awqc.backend import Backend
from awqc.backends.cpu import CpuBackend
from awqc.context import Context
from awqc.errors import PipelineError
from awqc.graph import Graph
from awqc.passes.lower import Lower
from awqc.passes.quantize_linears import QuantizeLinears
from awqc.passes.round_weights import RoundWeights
from awqc.pipeline import Pipeline
from awqc.runtime.lowered import LoweredExperts, LoweredLinears, QuantizedLinears
from tests.passes.experts import STACKS, mixed
from tests.passes.graphs import OBSERVED, Mlp, ops, run, samples

QUANTIZED = (*OBSERVED, RoundWeights(), QuantizeLinears())


def lowered(
    backend: str | Backend, module: nn.Module | None = None, **options: Any
) -> tuple[Graph, Context, LoweredLinears]:
    options = {"group_size": 32, **options}
    graph, context = run(module or Mlp(64, 64), samples(2, width=64), *QUANTIZED, Lower(backend), **options)
    return graph, context, graph.facts[LoweredLinears]


def test_every_quantized_linear_gets_the_op_of_the_backend() -> None:
    graph, context, found = lowered("cpu")
    assert list(found) == ["up", "down"]
    assert sum(op in ("awqc.qlinear_llvm", "awqc.qlinear_cpu") for op in ops(graph)) == 2
    assert "awqc.qlinear" not in ops(graph)
    assert {row.backend for row in context.report.quantized()} == {"cpu"}
    assert "up.packed" in graph.parameters()
    assert "up.codes" not in graph.parameters()
    assert QuantizedLinears not in graph.facts


def test_reference_computes_what_the_canonical_op_computes() -> None:
    batches = samples(2, width=64)
    plain, _ = run(Mlp(64, 64), batches, *QUANTIZED, group_size=32)
    graph, _, _ = lowered("reference")
    for batch in batches:
        assert torch.equal(graph.run(batch)[0], plain.run(batch)[0])


def test_a_named_backend_that_refuses_is_replaced_and_says_why() -> None:
    _, context, _ = lowered("cpu", bits=8)
    for row in context.report.quantized():
        assert row.backend == "reference"
        assert "cpu refused: holds codes of at most 4 bits, not 8" in row.notes


@pytest.mark.usefixtures("without_llvm")
def test_each_linear_is_refused_on_its_own() -> None:
    """48 output features are three times 16; 40 are no multiple of it."""
    module = Mlp(64, 40)
    _, context, _ = lowered("cpu", module)
    rows = context.report.linears
    assert rows["up.weight"].backend == "reference"
    assert "cpu refused: needs a multiple of 16 output features, not 40" in rows["up.weight"].notes
    assert rows["down.weight"].backend == "reference"
    assert any(note.startswith("cpu refused: needs groups that split") for note in rows["down.weight"].notes)


def test_auto_takes_the_best_and_does_not_complain_of_the_others() -> None:
    _, context, _ = lowered("auto")
    assert {row.backend for row in context.report.quantized()} == {"cpu"}
    _, context, _ = lowered("auto", bits=8)
    for row in context.report.quantized():
        assert row.backend == "reference"
        assert row.notes == []


def test_a_backend_object_brings_its_options() -> None:
    graph, _, _ = lowered(CpuBackend(prefill="packed"))
    assert "up.dense" not in graph.parameters()
    assert "up.dense" in lowered(CpuBackend(prefill="dense"))[0].parameters()


def test_nothing_quantized_is_nothing_lowered() -> None:
    graph, _ = run(Mlp(), samples(2), *OBSERVED, QuantizeLinears(), Lower("cpu"))
    assert graph.facts[LoweredLinears] == {}


def test_it_needs_quantized_linears() -> None:
    with pytest.raises(PipelineError) as caught:
        Pipeline((Lower(), QuantizeLinears())).check_order()
    assert str(caught.value) == (
        "'lower' requires QuantizedLinears, provided by 'quantize-linears': move it earlier"
    )


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("transposed", [False, True])
def test_experts_get_the_op_of_the_backend(backend: str, transposed: bool) -> None:
    graph, context = mixed(*QUANTIZED, Lower(backend), transposed=transposed)
    known = {"reference": ["awqc.qexperts"], "cpu": ["awqc.qexperts_llvm", "awqc.qexperts_cpu"]}[backend]
    assert sum(op in known for op in ops(graph)) == 2
    found = graph.facts[LoweredExperts]
    assert list(found) == list(STACKS)
    assert {found[name].transposed for name in STACKS} == {transposed}
    assert {context.report.linears[name].backend for name in STACKS} == {backend}
    for name in STACKS:
        rounded = graph.weights.rounded(name)
        assert rounded is not None
        assert torch.equal(found[name].unpack()[0].codes, rounded.weight.codes)
