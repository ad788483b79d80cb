"""Regions of a trace that only set a mode are part of the graph; those that do more are not."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.nets import Net, analyze, linear, members, norm, refusals


def _with_gradients(m: Net, x: Tensor) -> Tensor:
    with torch.enable_grad():
        h = m.first(m.norm(x))
    return m.second(torch.relu(h))


def _without_autocast(m: Net, x: Tensor) -> Tensor:
    with torch.autocast("cpu", enabled=False), torch.enable_grad():
        h, halved = m.first(m.norm(x)), x / 2
    return m.second(torch.relu(h)) + halved


@pytest.mark.parametrize("compute", [_with_gradients, _without_autocast])
def test_the_ops_of_a_mode_are_in_the_graph(compute: object) -> None:
    found = analyze(Net(compute, norm=norm(), first=linear(), second=linear()))  # type: ignore[arg-type]
    assert found.capture.rung == "torch.export"
    assert members(found) == {"norm.weight": ("first.weight",), "first.weight": ("second.weight",)}


def test_autocast_that_is_on_is_not_looked_into() -> None:
    def compute(m: Net, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            h = m.inner(m.norm(x))
        return m.outer(h.to(x.dtype))

    inner = Net(compute, norm=norm(), inner=linear(), outer=linear())
    found = analyze(
        Net(
            lambda m, x: m.last(torch.relu(m.first(x)) + m.body(x)), body=inner, first=linear(), last=linear()
        )
    )
    assert found.capture.rung == "torch.export with regions"
    assert "wrap_with_autocast" in found.capture.notes[0]
    assert set(refusals(found)) == {"body.inner.weight", "body.outer.weight", "first.weight", "last.weight"}
