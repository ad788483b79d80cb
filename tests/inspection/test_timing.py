"""Nodes measured one by one."""

from __future__ import annotations

import pytest
import torch

from awqc.inspection import timing
from awqc.inspection.cost import costs
from awqc.inspection.subject import Subject
from awqc.inspection.timing import is_here, measure, measured_rates, sheet_rates


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "_BUDGET", 0.0)
    monkeypatch.setattr(timing, "ROTATED", 1 << 22)
    monkeypatch.setattr(timing, "_READ", 1 << 20)


def test_every_node_gets_a_time(loaded: Subject) -> None:
    found = costs(loaded)
    steps: list[tuple[int, int]] = []
    measure(loaded, found, lambda done, total: steps.append((done, total)))
    assert [cost.name for cost in found if not cost.seconds] == []
    assert steps[-1] == (len(found), len(found))


def test_calls_that_are_alike_are_timed_once(loaded: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    timed: list[str] = []
    monkeypatch.setattr(timing, "_time", lambda subject, node: (timed.append(node.name), (1.0, ""))[1])
    found = costs(loaded)
    measure(loaded, found)
    assert len(timed) < len(found) / 2
    linears = {cost.linear: cost.name for cost in found if cost.linear}
    assert linears["model.layers.0.mlp.down_proj"] in timed
    assert linears["model.layers.1.mlp.down_proj"] not in timed


def test_what_cannot_run_says_why(loaded: Subject) -> None:
    (cost, *_) = [one for one in costs(loaded) if one.op == "aten.silu"]
    (node,) = [n for n in loaded.graph.nodes if n.name == cost.name]
    broken = loaded.graph.__class__()
    x = broken.placeholder("x")
    x.meta["val"] = torch.empty(2, 3)
    bad = broken.call_function(torch.ops.aten.mm.default, (x, x))
    bad.meta["val"] = torch.empty(2, 3)
    seconds, why = timing._time(loaded, bad)
    assert seconds is None
    assert why.startswith("RuntimeError: ")
    assert node.target is torch.ops.aten.silu.default


def test_where_rates_come_from(loaded: Subject, outlined: Subject) -> None:
    found = measured_rates(loaded)
    assert found.read > 1e8
    assert found.source.startswith("a streaming read on this cpu device reaches ")
    assert sheet_rates(loaded) is None
    sheet = sheet_rates(outlined)
    assert sheet is not None
    assert sheet.source == "data sheet of nvidia_h200: 4.8 TB/s, 989 dense 16-bit TFLOP/s"


def test_what_is_here(loaded: Subject, outlined: Subject) -> None:
    assert is_here(loaded)
    if not torch.cuda.is_available():
        assert not is_here(outlined)
