"""A report as the columns that the page reads: compact, since a mixture of experts has 100,000 linears.

Texts that repeat (templates of names, schemes, reasons) are numbered and stored once; a name is its template
and the numbers in it; measured values keep four digits.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Mapping
from typing import Any

from awqc.page.graphs import LayerGraph
from awqc.page.layers import Layers, numbers, template
from awqc.quantized import Scheme, packed_bytes
from awqc.report import GroupRow, LinearRow, Report

_SCHEME = re.compile(r"W(?P<bits>\d+) (row|g(?P<size>\d+)) (?P<kind>asym|sym)")


class Strings:
    """Texts that are stored once; :meth:`number` is what stands for one. The empty text is 0."""

    def __init__(self) -> None:
        self._numbers = {"": 0}

    def number(self, text: str | None) -> int:
        """The number of ``text``."""
        return self._numbers.setdefault(text or "", len(self._numbers))

    def texts(self) -> list[str]:
        """All texts by number."""
        return list(self._numbers)


def document(report: Report, graphs: Mapping[str, LayerGraph]) -> dict[str, Any]:
    """Everything that the page's script draws.

    Args:
        report: of a compile.
        graphs: by path of the layer, empty where no graph was captured; see :mod:`awqc.page.graphs`.
    """
    strings = Strings()
    layers = Layers(row.name for row in report.linears.values())
    names = _Layers(layers)
    linears = _linears(report.linears, strings, names)
    groups = _groups(report, strings, names)
    return {
        "strings": strings.texts(),
        "layers": [{"stack": stack, "index": index} for stack, index in names.found],
        "linears": linears,
        "groups": groups,
        "graphs": {
            str(names.number(layer)): {"edges": [list(edge) for edge in graph.edges], "diff": graph.diff}
            for layer, graph in graphs.items()
        },
    }


def stored_bytes(row: LinearRow) -> int:
    """Bytes of the linear's weight as the checkpoint stores it; at 16 bits unless quantized."""
    scheme = read_scheme(row.scheme)
    if row.decision != "quantized" or scheme is None:
        return 2 * row.parameters
    return (row.expert_count or 1) * packed_bytes(row.out_features, row.in_features, scheme)


@functools.cache
def read_scheme(text: str) -> Scheme | None:
    """The scheme that reads ``text``."""
    found = _SCHEME.fullmatch(text)
    if found is None:
        return None
    return Scheme(int(found["bits"]), int(found["size"] or -1), found["kind"] == "asym")


class _Layers:
    """Numbers of layers in the order in which their linears come; number 0 is outside of all."""

    def __init__(self, layers: Layers) -> None:
        self._layers = layers
        self._numbers = {"": 0}
        self.found = [("", -1)]

    def of(self, name: str) -> int:
        """The number of the layer that ``name`` belongs to."""
        place = self._layers.place(name)
        if place.layer not in self._numbers:
            self._numbers[place.layer] = len(self.found)
            self.found.append((place.stack, place.index))
        return self._numbers[place.layer]

    def kind(self, name: str) -> str:
        """``name`` within its layer, without numbers."""
        return self._layers.place(name).kind

    def number(self, layer: str) -> int:
        """The number of the layer with this path, 0 if no linear is in it."""
        return self._numbers.get(layer, 0)


def _linears(rows: Mapping[str, LinearRow], strings: Strings, layers: _Layers) -> dict[str, list[Any]]:
    there = list(rows.values())
    return {
        "name": [_name(row.name, strings) for row in there],
        "kind": [strings.number(layers.kind(row.name)) for row in there],
        "layer": [layers.of(row.name) for row in there],
        "out": [row.out_features for row in there],
        "in": [row.in_features for row in there],
        "expert_count": [row.expert_count for row in there],
        "expert_tokens": [row.expert_tokens for row in there],
        "borrowing": [row.borrowing for row in there],
        "bytes": [stored_bytes(row) for row in there],
        "decision": [strings.number(row.decision) for row in there],
        "reason": [strings.number(row.reason) for row in there],
        "scheme": [strings.number(row.scheme) for row in there],
        "no_group": [strings.number(row.no_group) for row in there],
        "before": [rounded(row.nearest_error) for row in there],
        "after": [rounded(row.error) for row in there],
        "clipped": [rounded(row.clipped) for row in there],
        "rounding": [strings.number(row.rounding) for row in there],
        "backend": [strings.number(row.backend) for row in there],
        "notes": [strings.number("; ".join(row.notes)) for row in there],
    }


def _groups(report: Report, strings: Strings, layers: _Layers) -> dict[str, list[Any]]:
    rows = list(report.groups.values())
    index = {row.name: i for i, row in enumerate(report.linears.values())}
    grid = list(dict.fromkeys((family, ratio) for row in rows for family, ratio, _ in row.curve))
    points = {point: i for i, point in enumerate(grid)}
    return {
        "grid": [[family, ratio] for family, ratio in grid],
        "name": [_name(row.name, strings) for row in rows],
        "layer": [layers.of(row.linears[0] if row.linears else row.name) for row in rows],
        "linears": [[index[name] for name in row.linears if name in index] for row in rows],
        "channels": [row.channels for row in rows],
        "alive": [row.alive for row in rows],
        "family": [strings.number(row.family) for row in rows],
        "ratio": [rounded(row.ratio) for row in rows],
        "applied": [int(row.applied) for row in rows],
        "gain": [rounded(row.gain) for row in rows],
        "curve": [_curve(row, points) for row in rows],
        "tokens": [row.tokens for row in rows],
        "held_out": [row.held_out_tokens for row in rows],
    }


def _curve(row: GroupRow, points: Mapping[tuple[str, float], int]) -> list[float | None]:
    """Loss by point of the common grid, up to the last that the group has."""
    losses: list[float | None] = [None] * len(points)
    for family, ratio, loss in row.curve:
        losses[points[family, ratio]] = rounded(loss)
    while losses and losses[-1] is None:
        losses.pop()
    return losses


def _name(name: str, strings: Strings) -> list[int]:
    return [strings.number(template(name)), *numbers(name)]


def rounded(value: float | None, digits: int = 4) -> float | None:
    """``value`` to so many significant digits; None for what is missing, not finite or not a number."""
    if value is None or value != value or value in (float("inf"), float("-inf")):
        return None
    return float(f"{value:.{digits}g}")


def mean(values: Iterable[float | None]) -> float | None:
    """Of the values that are there."""
    there = [value for value in values if value is not None]
    return sum(there) / len(there) if there else None
