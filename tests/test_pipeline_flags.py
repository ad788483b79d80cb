"""What the environment asks of a pipeline: passes skipped, checks turned off, graphs dumped."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from awqc.context import Context
from awqc.errors import PipelineError, VerifyError
from awqc.flags import Flags
from awqc.graph import Graph
from awqc.passes.canonicalize import Canonicalize
from awqc.passes.round_weights import RoundWeights
from awqc.pipeline import Pass, Pipeline
from tests.passes.graphs import OBSERVED, Mlp, context_of, graph_of, run, samples
from tests.test_pipeline import Change, double, nothing


def run_with(flags: Flags | None, *passes: Pass) -> tuple[Graph, Context]:
    graph, context = graph_of(Mlp(), **samples(1)[0]), context_of(samples(1))
    Pipeline(passes).run(graph, context, flags)
    return graph, context


def test_flags_come_from_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("SKIP", "DUMP", "DUMP_TO", "CHECK"):
        monkeypatch.delenv(f"AWQC_{name}", raising=False)
    assert Flags.from_environment() == Flags()
    monkeypatch.setenv("AWQC_SKIP", "clip-weights, search-scales,")
    monkeypatch.setenv("AWQC_DUMP", "canonicalize")
    monkeypatch.setenv("AWQC_DUMP_TO", str(tmp_path))
    monkeypatch.setenv("AWQC_CHECK", "0")
    assert Flags.from_environment() == Flags(
        skip=frozenset({"clip-weights", "search-scales"}),
        dump=frozenset({"canonicalize"}),
        dump_to=tmp_path,
        check=False,
    )


def test_skip(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWQC_SKIP", "change")
    run_with(None, Canonicalize(), Change(double("down.weight")))


def test_skipping_is_proven_like_any_other_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWQC_SKIP", "search-scales")
    graph, context = graph_of(Mlp(), **samples(1)[0]), context_of(samples(1))
    with pytest.raises(PipelineError) as caught:
        Pipeline.default().run(graph, context)
    assert str(caught.value) == "'fold-scales' requires Scales, which no pass of this pipeline provides"


@pytest.mark.parametrize("variable", ["AWQC_SKIP", "AWQC_DUMP"])
def test_a_misspelt_name(variable: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(variable, "canonicalise")
    with pytest.raises(PipelineError) as caught:
        run_with(None, Canonicalize(), Change(nothing))
    assert str(caught.value) == "no pass is called 'canonicalise': there are canonicalize, change"


def test_checks_can_be_turned_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWQC_CHECK", "0")
    run_with(None, Canonicalize(), Change(double("down.weight")))
    monkeypatch.setenv("AWQC_CHECK", "1")
    with pytest.raises(VerifyError):
        run_with(None, Canonicalize(), Change(double("down.weight")))


class Transposed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.w = nn.Parameter(torch.randn(32, 32))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.w.T


def test_dumps_to_files(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("AWQC_DUMP", "canonicalize")
    monkeypatch.setenv("AWQC_DUMP_TO", str(tmp_path / "new"))
    graph, _ = run(Transposed(), samples(1), Canonicalize(), Change(nothing))
    assert sorted(p.name for p in (tmp_path / "new").iterdir()) == ["canonicalize.diff", "canonicalize.txt"]
    assert (tmp_path / "new" / "canonicalize.txt").read_text() == graph.text()
    diff = (tmp_path / "new" / "canonicalize.diff").read_text().splitlines()
    assert "+linear_default: f32[1, 8, 32] = aten.linear(x, w)" in diff
    assert any(line.startswith("-matmul: ") for line in diff)


def test_dumps_to_the_terminal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.delenv("AWQC_DUMP_TO", raising=False)
    monkeypatch.setenv("AWQC_DUMP", "all")
    run(Transposed(), samples(1), Canonicalize(), Change(nothing))
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "--- after canonicalize\n" in shown.err
    assert "+linear_default: f32[1, 8, 32] = aten.linear(x, w)" in shown.err
    # A pass that changes nothing shows the graph, not an empty difference.
    assert "--- after change\nw: f32[32, 32] = parameter\n" in shown.err


def test_passes_of_a_stage_are_dumped_too(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """They change weights, not nodes: what is written is the graph after the last stage."""
    monkeypatch.setenv("AWQC_DUMP", "round-weights")
    monkeypatch.setenv("AWQC_DUMP_TO", str(tmp_path))
    graph, _ = run(Mlp(), samples(2), *OBSERVED, RoundWeights())
    assert (tmp_path / "round-weights.txt").read_text() == graph.text()
