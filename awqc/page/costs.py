"""What ``awqc inspect --kernels --json`` has found, for the page: kernels, bytes and times of nodes."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from awqc.errors import ConfigError
from awqc.page.facts import duration
from awqc.tables import size


@dataclass(frozen=True)
class CostRow:
    """Nodes that are alike, or a stage.

    Args:
        name: of the stage, or of the kind of node.
        count: how many nodes.
        kernel: what each of them runs; empty for a stage.
        moved: bytes of memory, of all together.
        floor, seconds: of all together; None if that is not known.
        share: of the whole model's time, 0 to 1.
    """

    name: str
    count: int
    kernel: str
    moved: str
    floor: str
    seconds: str
    share: float


@dataclass(frozen=True)
class Costs:
    """Where the time of a step goes.

    Args:
        about: tokens, device, and where floors come from, in a sentence each.
        measured: whether nodes were measured.
        stages: in the order in which they run.
        nodes: the longest first.
        linears: by name of a quantized linear, its kernel, bytes and time in a few words.
    """

    about: list[str]
    measured: bool
    stages: list[CostRow]
    nodes: list[CostRow]
    linears: Mapping[str, str]


def read_costs(file: Path) -> Costs:
    """Read what ``awqc inspect MODEL --kernels --json`` printed into ``file``.

    Raises:
        ConfigError: if it is not that.
    """
    try:
        return _costs(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        what = f"no {error}" if isinstance(error, KeyError) else error
        raise ConfigError(
            f"{file} is not what 'awqc inspect --kernels --json' prints ({what}): make it with "
            "'awqc inspect OUT --kernels --measure --json > FILE'"
        ) from error


def _costs(found: Mapping[str, Any]) -> Costs:
    whole, nodes = found["total"], found["nodes"]
    alike: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for node in nodes:
        alike.setdefault((f"{node['kind']} {node['shapes']}", _kernel(node)), []).append(node)
    by_node = [
        _row(part[0]["kind"], len(part), kernel, _sums(part), whole) for (_, kernel), part in alike.items()
    ]
    tokens = int(found["tokens"])
    plural = "s" if tokens > 1 else ""
    about = [f"{tokens} token{plural} through the model on {found['hardware']}, without past."]
    if found["rates"]:
        about.append(f"Floors: {found['rates']['source']}.")
    return Costs(
        about,
        whole["seconds"] is not None,
        [_row(stage["stage"], stage["nodes"], "", stage, whole) for stage in found["stages"]],
        sorted(by_node, key=lambda row: -row.share),
        {node["linear"]: _words(node) for node in nodes if node["linear"]},
    )


def _kernel(node: Mapping[str, Any]) -> str:
    return " + ".join(dict.fromkeys(launch["kernel"] for launch in node["launches"]))


def _sums(part: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    there = list(part)
    sums: dict[str, Any] = {"moved": sum(node["moved"] for node in there)}
    for key in ("floor", "seconds"):
        known = [node[key] for node in there if node[key] is not None]
        sums[key] = sum(known) if known else None
    return sums


def _row(name: str, count: int, kernel: str, sums: Mapping[str, Any], whole: Mapping[str, Any]) -> CostRow:
    return CostRow(
        name,
        count,
        kernel,
        size(sums["moved"]),
        _time(sums["floor"]),
        _time(sums["seconds"]),
        _weight(sums) / (_weight(whole) or 1.0),
    )


def _weight(sums: Mapping[str, Any]) -> float:
    return float(sums["seconds"] or sums["floor"] or sums["moved"])


def _words(node: Mapping[str, Any]) -> str:
    """``marlin_small.cu:small, 381.18 kB, 12.0 us``."""
    words = [_kernel(node), size(node["moved"])]
    if node["seconds"]:
        words.append(_time(node["seconds"]))
    if node["floor"]:
        words.append(f"floor {_time(node['floor'])}")
    return ", ".join(words)


def _time(seconds: float | None) -> str:
    """Three digits."""
    if seconds is None:
        return ""
    if seconds >= 1:
        return duration(seconds)
    unit, value = ("ms", 1e3 * seconds) if seconds >= 1e-3 else ("us", 1e6 * seconds)
    return f"{value:.3g} {unit}"
