"""The lowered graph as text, for networkx and for Graphviz."""

from __future__ import annotations

import copy

import networkx
import pytest
import torch
from torch import Tensor, fx, nn
from transformers import LlamaForCausalLM

import awqc
from awqc.runtime.lowered_graph import LoweredGraph, node_name, to_dot, to_networkx

DOWN = "model.layers.0.mlp.down_proj"


@pytest.fixture(scope="module")
def graph(tiny_llama: LlamaForCausalLM, token_ids: Tensor) -> LoweredGraph:
    config = awqc.QuantConfig(group_size=32)
    return awqc.compile(tiny_llama, token_ids, backend="reference", config=config).graph


def test_text_names_every_linear(graph: LoweredGraph) -> None:
    lines = [line for line in graph.text().splitlines() if "= awqc.qlinear(" in line]
    assert len(lines) == len(graph.meta["quantized"])
    (down,) = [line for line in lines if f"{DOWN}.codes" in line]
    assert down.endswith(f"{DOWN}.codes, {DOWN}.scales, {DOWN}.zeros, None, 32)")
    assert copy.deepcopy(graph).text() == graph.text()


def test_networkx_has_every_node_and_its_operands(graph: LoweredGraph) -> None:
    found = graph.to_networkx()
    nodes = list(graph.graph.nodes)
    assert list(found) == [node_name(node) for node in nodes]
    assert networkx.is_directed_acyclic_graph(found)
    for node in nodes:
        assert set(found.predecessors(node_name(node))) == {node_name(n) for n in node.all_input_nodes}
    (down,) = [name for name, about in found.nodes(data=True) if about.get("linear") == DOWN]
    about = found.nodes[down]
    assert (about["kind"], about["op"], about["dtype"]) == ("quantized", "awqc.qlinear", "float32")
    assert about["shape"][-1] == found.nodes[f"{DOWN}.scales"]["shape"][0]
    assert found.edges[f"{DOWN}.zeros", down]["positions"] == (3,)


def test_an_operand_that_is_given_twice(graph: LoweredGraph) -> None:
    nodes = fx.Graph()
    x = nodes.placeholder("x")
    y = nodes.call_function(torch.ops.aten.mul.Tensor, (x, x))
    nodes.output([y])
    found = to_networkx(nodes)
    assert found.edges["x", y.name]["positions"] == (0, 1)
    assert found.nodes["output"]["shape"] is None


def test_dot_draws_ops_or_parameters_too(graph: LoweredGraph) -> None:
    plain, full = graph.to_dot().splitlines(), graph.to_dot(parameters=True).splitlines()
    assert (plain[0], plain[-1]) == ("digraph {", "}")
    nodes = list(graph.graph.nodes)
    boxes = [line for line in plain if "[label=" in line]
    assert len(boxes) == sum(node.op != "get_attr" for node in nodes)
    assert sum("[label=" in line for line in full) == len(nodes)
    assert sum("->" in line for line in full) == sum(len(node.all_input_nodes) for node in nodes)
    (down,) = [line for line in boxes if f"\\n{DOWN}.codes\\n" in line]
    assert "#f6dccb" in down


def test_what_dot_would_misread_is_escaped() -> None:
    nodes = fx.Graph()
    nodes.output([nodes.create_node("get_attr", 'a"b\\c', name="odd")])
    assert '"a\\"b\\\\c"' in to_dot(nodes, parameters=True)


def test_a_module_called_like_a_method_still_runs() -> None:
    nodes = fx.Graph()
    x = nodes.placeholder("x")
    weight = nodes.create_node("get_attr", "text.weight", name="text_weight")
    nodes.output(nodes.call_function(torch.ops.aten.mul.Tensor, (x, weight)))
    found = LoweredGraph({"text.weight": torch.full((2,), 3.0)}, nodes)
    assert torch.equal(found(torch.ones(2)), torch.full((2,), 3.0))
    assert LoweredGraph.text(found).startswith("x: ? = input\n")
    assert isinstance(found, nn.Module)
