"""Kernels, bytes and times as the page shows them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from awqc.errors import ConfigError
from awqc.page.costs import read_costs
from awqc.page.render import render
from tests.page.reports import synthetic


def node(name: str, kind: str, seconds: float | None, linear: bool = True) -> dict[str, Any]:
    launches = [{"kernel": "fast.cu:product", "bytes": 900}, {"kernel": "fast.cu:join", "bytes": 100}]
    return {
        "kind": kind,
        "shapes": "1x8 -> 1x4",
        "linear": name if linear else None,
        "launches": launches if linear else [{"kernel": "aten.silu", "bytes": 1000}],
        "moved": 1000,
        "floor": 1e-6,
        "seconds": seconds,
    }


def document(seconds: float | None = 2e-6) -> dict[str, Any]:
    nodes = [
        node("net.0.up", "up", seconds),
        node("net.1.up", "up", seconds),
        node("silu", "aten.silu", seconds, linear=False),
    ]
    whole = {"moved": 3000, "floor": 3e-6, "seconds": None if seconds is None else 3 * seconds, "nodes": 3}
    return {
        "hardware": "nvidia_h200",
        "tokens": 1,
        "rates": {"source": "made up"},
        "nodes": nodes,
        "stages": [{"stage": "up", **whole}],
        "total": whole,
    }


def written(folder: Path, found: object) -> Path:
    file = folder / "kernels.json"
    file.write_text(json.dumps(found))
    return file


def test_nodes_that_are_alike_share_a_row(tmp_path: Path) -> None:
    costs = read_costs(written(tmp_path, document()))
    up, silu = costs.nodes
    assert (up.name, up.count, up.kernel) == ("up", 2, "fast.cu:product + fast.cu:join")
    assert (up.moved, up.floor, up.seconds) == ("2.00 kB", "2 us", "4 us")
    assert up.share == pytest.approx(2 / 3)
    assert (silu.count, silu.kernel) == (1, "aten.silu")
    assert costs.about == ["1 token through the model on nvidia_h200, without past.", "Floors: made up."]
    assert costs.linears == {
        f"net.{i}.up": "fast.cu:product + fast.cu:join, 1.00 kB, 2 us, floor 1 us" for i in (0, 1)
    }


def test_without_measurements_floors_share_the_time(tmp_path: Path) -> None:
    costs = read_costs(written(tmp_path, document(None)))
    assert not costs.measured
    assert [row.share for row in costs.nodes] == pytest.approx([2 / 3, 1 / 3])
    assert costs.nodes[0].seconds == ""


@pytest.mark.parametrize("found", [[], {}, {"total": {}, "nodes": [1]}, "text"])
def test_what_is_something_else(tmp_path: Path, found: object) -> None:
    file = written(tmp_path, found)
    with pytest.raises(ConfigError, match=r"is not what 'awqc inspect --kernels --json' prints"):
        read_costs(file)


def test_the_page_has_the_section_only_with_costs(tmp_path: Path) -> None:
    costs = read_costs(written(tmp_path, document()))
    assert 'id="time"' not in render(synthetic(2), "a model")
    page = render(synthetic(2), "a model", costs=costs)
    assert page.count('<table class="costs">') == 2
    assert "fast.cu:product + fast.cu:join" in page
