"""Layers of a graph: their text, and where scales flow."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import fx, nn

import awqc
from awqc.page.graphs import edges, full_diff, layer_graphs, layer_lines
from awqc.page.layers import Layers


class Block(nn.Module):
    """``x + down(silu(gate(n)) * up(n))`` of ``n = norm(x)``."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(width)
        self.gate, self.up = nn.Linear(width, 2 * width, bias=False), nn.Linear(width, 2 * width, bias=False)
        self.down = nn.Linear(2 * width, width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        n = self.norm(x)
        return x + self.down(nn.functional.silu(self.gate(n)) * self.up(n))


class Net(nn.Module):
    def __init__(self, depth: int = 3, width: int = 8) -> None:
        super().__init__()
        self.embed = nn.Embedding(16, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(depth))
        self.head = nn.Linear(width, 16, bias=False)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(input_ids)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


@pytest.fixture(scope="module")
def analysis() -> awqc.Analysis:
    torch.manual_seed(0)
    return awqc.analyze(Net().eval(), torch.arange(4)[None])


@pytest.fixture(scope="module")
def layers(analysis: awqc.Analysis) -> Layers:
    return Layers(name.removesuffix(".weight") for name in analysis.linears)


def test_every_line_is_in_one_layer(analysis: awqc.Analysis, layers: Layers) -> None:
    found = layer_lines(analysis.graph.fx, layers)
    assert set(found) == {"", "blocks.0", "blocks.1", "blocks.2"}
    assert sorted(line for lines in found.values() for line in lines) == sorted(
        analysis.graph.text().splitlines()
    )


def test_a_layer_ends_where_one_value_crosses(analysis: awqc.Analysis, layers: Layers) -> None:
    """At the sum that leaves the block, though the next block's norm begins without a parameter."""
    found = layer_lines(analysis.graph.fx, layers)
    computed = [line for line in found["blocks.1"] if "parameter" not in line]
    assert "aten.add.Tensor" in computed[-1]
    assert [line for line in computed if "blocks.0" in line or "blocks.2" in line] == []
    assert len(computed) == len([line for line in found["blocks.0"] if "parameter" not in line])


def test_a_graph_without_parameters() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    x.meta["val"] = torch.empty(2, device="meta")
    graph.output(x)
    assert layer_lines(graph, Layers([])) == {"": ["x: f32[2] = input", "return x"]}


def test_scales_flow_from_producers_to_consumers(analysis: awqc.Analysis) -> None:
    found = {group.name: set(edges(group)) for group in analysis.groups}
    assert found["blocks.1.norm.weight"] == {
        ("blocks.1.norm.weight", "blocks.1.gate.weight", ""),
        ("blocks.1.norm.weight", "blocks.1.up.weight", ""),
    }
    assert found["blocks.1.up.weight"] == {("blocks.1.up.weight", "blocks.1.down.weight", "mul")}


def test_before_and_after_by_layer(analysis: awqc.Analysis, layers: Layers) -> None:
    other = analysis.graph.copy()
    for node in list(other.fx.nodes):
        if node.name == "silu_1":
            node.target = torch.ops.aten.relu.default
    found = layer_graphs(layers, analysis.graph.fx, other.fx, analysis.groups)
    assert changed(found["blocks.0"].diff) == []
    (removed, added) = changed(found["blocks.1"].diff)
    assert removed.replace("aten.silu", "aten.relu")[1:] == added[1:]
    assert len(found["blocks.1"].edges) == 3


def test_lines_say_what_is_known_of_their_linear(analysis: awqc.Analysis, layers: Layers) -> None:
    """Packed tensors are named after their linear: here those of a norm stand for them."""
    plain = layer_lines(analysis.graph.fx, layers)["blocks.1"]
    found = layer_lines(analysis.graph.fx, layers, {"blocks.1.norm": "fast.cu, 1 us"})["blocks.1"]
    different = [(a, b) for a, b in zip(plain, found, strict=True) if a != b]
    assert different
    assert all(b == f"{a}  # fast.cu, 1 us" and "blocks.1.norm.weight" in a for a, b in different)


def changed(diff: list[str]) -> list[str]:
    return [line for line in diff if line[0] != " "]


def sides(diff: list[str]) -> Iterator[list[str]]:
    for other in "+-":
        yield [line[1:] for line in diff if line[0] != other]


def test_a_full_diff_holds_both_texts() -> None:
    before, after = list("abcdef"), list("abxdeyf")
    assert list(sides(full_diff(before, after))) == [before, after]
    assert full_diff(["a"], ["b"]) == ["-a", "+b"]
