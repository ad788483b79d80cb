"""What the compiler made of each layer: the text of its graph before and after, and where scales flow.

Only config.json is needed for the graph before; the one after is that of the loaded checkpoint.
"""

from __future__ import annotations

import difflib
import itertools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

import torch
from torch import fx

from awqc.page.layers import Layers
from awqc.report import Report
from awqc.runtime.lowered_graph import quantized_linear
from awqc.text import graph_text

if TYPE_CHECKING:
    from awqc.scaleflow.groups import ScaleGroup
    from awqc.scaleflow.sites import Part

#: Length of the input that graphs are captured with.
_TOKENS = 16
#: From the parameter that a scale divides, to one that undoes it, through these ops.
Edge = tuple[str, str, str]


@dataclass
class LayerGraph:
    """One layer's part of the graph.

    Args:
        edges: producer, consumer, and what lies between.
        diff: the lines of the layer's text, after ``" "``, ``"-"`` (only before) or ``"+"`` (only after).
    """

    edges: list[Edge] = field(default_factory=list)
    diff: list[str] = field(default_factory=list)


def of_checkpoint(
    path: Path, report: Report, about: Mapping[str, str] = MappingProxyType({})
) -> dict[str, LayerGraph]:
    """The layers of a compiled checkpoint, by path; loads it.

    Args:
        about: by the name of a quantized linear, what its line after says too.

    Raises:
        AwqcError: if it cannot be loaded or captured.
    """
    from awqc.analysis import analyze
    from awqc.storage.loading import load

    ids = torch.arange(_TOKENS)[None] % 2
    before = analyze(path, ids)
    after = analyze(load(path), ids)
    layers = Layers(row.name for row in report.linears.values())
    return layer_graphs(layers, before.graph.fx, after.graph.fx, before.groups, about)


def layer_graphs(
    layers: Layers,
    before: fx.Graph,
    after: fx.Graph,
    groups: Iterable[ScaleGroup] = (),
    about: Mapping[str, str] = MappingProxyType({}),
) -> dict[str, LayerGraph]:
    """By path of the layer, with the empty path for what is outside of all layers.

    Args:
        layers: of the model.
        before, after: the graph before the first pass that changes it, and the lowered one.
        groups: scale groups of the graph before.
        about: by the name of a quantized linear, what its line after says too.
    """
    first, second = layer_lines(before, layers), layer_lines(after, layers, about)
    found = {
        layer: LayerGraph(diff=full_diff(first.get(layer, []), second.get(layer, [])))
        for layer in dict.fromkeys((*first, *second))
    }
    for group in groups:
        for edge in edges(group):
            found.setdefault(layers.place(edge[1]).layer, LayerGraph()).edges.append(edge)
    return found


def full_diff(before: list[str], after: list[str]) -> list[str]:
    """Every line of both texts in the order of a diff, marked as in :class:`LayerGraph`."""
    found: list[str] = []
    for tag, i, j, k, n in difflib.SequenceMatcher(None, before, after, autojunk=False).get_opcodes():
        if tag == "equal":
            found += [f" {line}" for line in before[i:j]]
        else:
            found += [f"-{line}" for line in before[i:j]]
            found += [f"+{line}" for line in after[k:n]]
    return found


def edges(group: ScaleGroup) -> Iterator[Edge]:
    """From every producer of a group to every consumer, with the ops in between that compute something."""
    for producer in group.producers:
        for consumer in group.consumers:
            yield producer.parameter, consumer.parameter, ", ".join(_between(group, producer, consumer))


def _between(group: ScaleGroup, producer: Part, consumer: Part) -> list[str]:
    """Names of the ops from one to the other, in order, without those that read either or only move data."""
    own, readers = set(producer.site.node.users), set(consumer.site.node.users)
    above = _ancestors(readers, group.values)
    nodes = [n for n in group.values if n in above and n not in own | readers and n.op == "call_function"]
    names = [str(node.target).split(".")[1] for node in nodes if not getattr(node.target, "is_view", True)]
    return list(dict.fromkeys(names))


def _ancestors(nodes: Iterable[fx.Node], within: Mapping[fx.Node, object]) -> set[fx.Node]:
    found: set[fx.Node] = set()
    waiting = list(nodes)
    while waiting:
        for operand in waiting.pop().all_input_nodes:
            if operand in within and operand not in found:
                found.add(operand)
                waiting.append(operand)
    return found


def layer_lines(
    graph: fx.Graph, layers: Layers, about: Mapping[str, str] = MappingProxyType({})
) -> dict[str, list[str]]:
    """The lines of the graph's text by layer; those of the linears ``about`` say what that has of them."""
    found: dict[str, list[str]] = {}
    texts = graph_text(graph).splitlines()
    for (node, layer), line in zip(node_layers(graph, layers).items(), texts, strict=True):
        linear = quantized_linear(node, about)
        found.setdefault(layer, []).append(f"{line}  # {about[linear]}" if linear else line)
    return found


def node_layers(graph: fx.Graph, layers: Layers) -> dict[fx.Node, str]:
    """The path of the layer of every node, empty outside of all.

    A parameter belongs where its name says. Computation is cut between the last node that reads a parameter
    of one layer and the first that reads one of the next, where fewest values cross: at the block's output.
    """
    computed = [n for n in graph.nodes if n.op == "call_function"]
    owners = dict(zip(computed, _owners(computed, layers), strict=True))
    return {
        node: layers.place(str(node.target)).layer if node.op == "get_attr" else owners.get(node, "")
        for node in graph.nodes
    }


def _owners(nodes: list[fx.Node], layers: Layers) -> list[str]:
    """The layer of every node of a sequence."""
    readers = [(i, layer) for i, node in enumerate(nodes) if (layer := _reads(node, layers)) is not None]
    if not readers:
        return [""] * len(nodes)
    crossing = _crossing(nodes)
    owners: list[str] = []
    for (at, layer), (following, other) in itertools.pairwise(readers):
        if layer != other:
            cut = min(range(at + 1, following + 1), key=lambda i: crossing[i])
            owners += [layer] * (cut - len(owners))
    return owners + [readers[-1][1]] * (len(nodes) - len(owners))


def _reads(node: fx.Node, layers: Layers) -> str | None:
    """The layer of the parameters that ``node`` reads, None if it reads none."""
    found = [layers.place(str(n.target)).layer for n in node.all_input_nodes if n.op == "get_attr"]
    return next((layer for layer in found if layer), "") if found else None


def _crossing(nodes: list[fx.Node]) -> list[int]:
    """How many values computed before each position are read at or after it."""
    position = {node: i for i, node in enumerate(nodes)}
    change = [0] * (len(nodes) + 2)
    for node, i in position.items():
        last = max((position.get(user, len(nodes)) for user in node.users), default=i)
        if last > i:
            change[i + 1] += 1
            change[last + 1] -= 1
    total, found = 0, []
    for step in change[: len(nodes) + 1]:
        total += step
        found.append(total)
    return found
