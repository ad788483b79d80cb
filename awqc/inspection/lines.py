"""The lowered graph as lines, each quantized linear with its scale group, its kernel, and why that one.

Layers that are alike but for numbers are shown once.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from torch import fx

from awqc.inspection.cost import arguments, result
from awqc.inspection.subject import Subject
from awqc.kernels.launch import launches
from awqc.page.graphs import node_layers
from awqc.runtime.lowered_graph import node_name
from awqc.text import graph_text, node_op, value_type

#: Numbers of nodes and in names of modules, which differ between layers that are alike.
_NUMBERS = re.compile(r"_\d+\b|(?<=\.)\d+(?=\.)")


@dataclass(frozen=True)
class About:
    """What is known of one quantized linear in the graph.

    Args:
        linear: its name.
        scheme: of its weight.
        group: the scale group, or why there is none.
        scale: the candidate that was folded, where a search is known to have taken place.
        backend: what runs it.
        kernels: what its call launches.
        refused: backends that were preferred, each with the reason why it refused.
    """

    linear: str
    scheme: str
    group: str
    scale: str
    backend: str
    kernels: list[str]
    refused: dict[str, str]

    def __str__(self) -> str:
        scale = f" ({self.scale})" if self.scale else ""
        return f"{self.scheme}; {self.group}{scale}; {self.backend}: {self.runs}"

    @property
    def runs(self) -> str:
        """The kernels, each once."""
        return " + ".join(dict.fromkeys(self.kernels))


@dataclass(frozen=True)
class Line:
    """One node.

    Args:
        node: the node.
        text: name, type, op and operands.
        about: of a quantized linear.
    """

    node: fx.Node
    text: str
    about: About | None = None

    def as_dict(self) -> dict[str, object]:
        """Plain values, for JSON."""
        operands = [node_name(n) for n in self.node.all_input_nodes]
        found: dict[str, object] = {
            "name": node_name(self.node),
            "op": node_op(self.node),
            "type": value_type(self.node.meta.get("val")),
            "operands": operands,
            "text": self.text,
        }
        return found | ({"linear": vars(self.about)} if self.about else {})


@dataclass(frozen=True)
class Segment:
    """Consecutive lines of one layer, or outside of all.

    Args:
        layer: its path; empty outside.
        lines: of its nodes.
        alike: further layers whose lines differ in numbers only.
    """

    layer: str
    lines: list[Line]
    alike: list[str] = field(default_factory=list)


def segments(subject: Subject, fold: bool = True) -> list[Segment]:
    """The whole graph in the order in which it runs.

    Args:
        fold: show layers that are alike once.
    """
    found: list[Segment] = []
    for segment in _segments(subject):
        before = found[-1] if found else None
        if fold and before and segment.layer and before.layer and _shape(before) == _shape(segment):
            before.alike.append(segment.layer)
        else:
            found.append(segment)
    return found


def _segments(subject: Subject) -> list[Segment]:
    layers = node_layers(subject.graph, subject.layers())
    texts = graph_text(subject.graph).splitlines()
    order = dict.fromkeys(layer for node, layer in layers.items() if node.op == "call_function" and layer)
    ranks = {layer: rank for rank, layer in enumerate(order)}
    head, tail = Segment("", []), Segment("", [])
    inside = {layer: Segment(layer, []) for layer in (*order, *layers.values()) if layer}
    begun = False
    for (node, layer), text in zip(layers.items(), texts, strict=True):
        begun |= layer in ranks and node.op == "call_function"
        segment = inside[layer] if layer else tail if begun else head
        segment.lines.append(Line(node, text, about(subject, node)))
    return [segment for segment in (head, *inside.values(), tail) if segment.lines]


def about(subject: Subject, node: fx.Node) -> About | None:
    """What is known of ``node``, if it is a quantized linear."""
    name = subject.linear(node)
    if name is None:
        return None
    module = subject.linears[name]
    target = node.target
    assert callable(target)
    found = launches(target, subject.hardware, arguments(node), result(node))
    return About(
        name,
        str(module.scheme),
        *_group(subject, name),
        module.backend.name,
        [launch.kernel for launch in found],
        module.refused,
    )


def _group(subject: Subject, name: str) -> tuple[str, str]:
    """The scale group, and what was chosen for it."""
    row = subject.row(name)
    if row is None:
        return "no report says which scale group", ""
    if row.group is None:
        return (f"no scale group: {row.no_group}" if row.no_group else "no scale group"), ""
    group = subject.report.groups.get(row.group)
    if group is None or not group.curve:
        return f"scale of {row.group}", ""
    return f"scale of {row.group}", f"{group.family} {group.ratio:g}" if group.applied else "none was better"


def _shape(segment: Segment) -> list[str]:
    """Its lines without numbers, and without what searches chose."""
    return [
        _NUMBERS.sub("", line.text + (f"{a.scheme} {a.group} {a.runs}" if (a := line.about) else ""))
        for line in segment.lines
    ]


def refusals(subject: Subject) -> dict[str, dict[str, list[str]]]:
    """Backend that runs some linears -> why another that was preferred refused -> the linears."""
    found: dict[str, dict[str, list[str]]] = {}
    for name, module in subject.linears.items():
        chosen = found.setdefault(module.backend.name, {})
        for other, why in module.refused.items():
            chosen.setdefault(f"{other} {why}", []).append(name)
    return found


def in_float(subject: Subject) -> Iterator[tuple[str, str]]:
    """Linears that stay in float, and why."""
    for row in subject.report.linears.values():
        if row.decision != "quantized":
            yield row.name, f"{row.decision}: {row.reason}"


def document(found: Iterable[Segment], subject: Subject) -> dict[str, object]:
    """Plain values, for JSON; layers must not be folded."""
    return {
        "hardware": subject.hardware.name,
        "outlined": subject.outlined,
        "nodes": [line.as_dict() | {"layer": segment.layer} for segment in found for line in segment.lines],
        "float": dict(in_float(subject)),
        "refused": {
            backend: {why: names for why, names in reasons.items()}
            for backend, reasons in refusals(subject).items()
        },
    }
