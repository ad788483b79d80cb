"""Two compiles side by side: which linears differ, by how much, in error and in size."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from awqc.checkpoints import Checkpoint, open_checkpoint
from awqc.errors import CheckpointError
from awqc.page.data import mean, stored_bytes
from awqc.page.sources import read_report
from awqc.report import REPORT_FILE, LinearRow, Report


@dataclass(frozen=True)
class Compiled:
    """What one side of a comparison is known by: a report, a checkpoint, or both."""

    path: Path
    report: Report | None
    checkpoint: Checkpoint | None

    def linears(self) -> dict[str, LinearState]:
        """State of every linear by module name."""
        stored = set(self.checkpoint.quantized_names()) if self.checkpoint is not None else set()
        if self.report is None:
            assert self.checkpoint is not None
            return {name: LinearState("quantized", bytes=self._bytes(name)) for name in sorted(stored)}
        return {
            row.name: LinearState(
                row.decision,
                row.scheme,
                self._scale(row),
                row.rounding,
                row.error,
                self._bytes(row.name) if row.name in stored else stored_bytes(row),
            )
            for row in self.report.linears.values()
        }

    def _scale(self, row: LinearRow) -> str:
        assert self.report is not None
        group = self.report.groups.get(row.group or "")
        return f"{group.family} {group.ratio:g}" if group is not None and group.applied else ""

    def _bytes(self, name: str) -> int:
        """Of the packed weight, from headers alone."""
        assert self.checkpoint is not None
        assert self.checkpoint.linears is not None
        infos = [self.checkpoint.tensors.info(tensor) for tensor in self.checkpoint.linears.tensors(name)]
        return sum(math.prod(info.shape) * info.dtype.itemsize for info in infos)


@dataclass(frozen=True)
class LinearState:
    """What one compile made of a linear.

    Args:
        decision, scheme, rounding, error: as in :class:`awqc.report.LinearRow`.
        scale: family and ratio of its input scale; empty if none was applied.
        bytes: of its weight as stored.
    """

    decision: str
    scheme: str = ""
    scale: str = ""
    rounding: str = ""
    error: float | None = None
    bytes: int = 0


@dataclass(frozen=True)
class LinearDifference:
    """One linear in both compiles.

    Args:
        name: module name.
        a, b: its states.
        weights: ``|W_b - W_a| / |W_a|`` (Frobenius) of the stored weights, scales that were folded into them
            included; None if they were not read, or one side stays in float.
    """

    name: str
    a: LinearState
    b: LinearState
    weights: float | None = None

    @property
    def fields(self) -> list[str]:
        """Names of what differs."""
        found = [name for name in vars(self.a) if getattr(self.a, name) != getattr(self.b, name)]
        return found + (["weights"] if self.weights else [])

    @property
    def change(self) -> float | None:
        """Relative change of the error, None where one is not known."""
        if not self.a.error or self.b.error is None:
            return None
        return self.b.error / self.a.error - 1


@dataclass
class Comparison:
    """Everything that differs between two compiles.

    Args:
        linears: those that both have and that differ, largest change of error first.
        same: number of those that do not.
        only_a, only_b: names that one side alone has.
        options: options with different values, those of a and of b.
        sizes: bytes of the linears' weights, by what is stored.
        errors: mean error of the linears that both sides know one of.
    """

    linears: list[LinearDifference] = field(default_factory=list)
    same: int = 0
    only_a: list[str] = field(default_factory=list)
    only_b: list[str] = field(default_factory=list)
    options: dict[str, tuple[Any, Any]] = field(default_factory=dict)
    sizes: tuple[int, int] = (0, 0)
    errors: tuple[float | None, float | None] = (None, None)


def open_compiled(path: Path) -> Compiled:
    """What awqc, or another tool, left in ``path``: a checkpoint with or without a report, or a report.

    Raises:
        CheckpointError: if it is neither, or damaged.
    """
    if not path.is_dir():
        return Compiled(path, read_report(path), None)
    has_report = (path / REPORT_FILE).is_file()
    has_weights = (path / "config.json").is_file() and any(path.glob("*.safetensors"))
    checkpoint = open_checkpoint(path) if has_weights else None
    if checkpoint is not None and checkpoint.format is None:
        checkpoint = None
    if checkpoint is None and not has_report:
        raise CheckpointError(f"{path} holds neither a quantized checkpoint nor {REPORT_FILE}")
    return Compiled(path, read_report(path) if has_report else None, checkpoint)


def compare(a: Compiled, b: Compiled, weights: Mapping[str, float] = MappingProxyType({})) -> Comparison:
    """Put two compiles side by side.

    Args:
        weights: :func:`weight_difference` of the linears that it was asked for.
    """
    first, second = a.linears(), b.linears()
    found = [
        LinearDifference(name, state, second[name], weights.get(name))
        for name, state in first.items()
        if name in second
    ]
    differing = [one for one in found if one.fields]
    known = [one for one in found if one.a.error is not None and one.b.error is not None]
    return Comparison(
        linears=sorted(differing, key=lambda one: -abs(one.change or 0.0)),
        same=len(found) - len(differing),
        only_a=[name for name in first if name not in second],
        only_b=[name for name in second if name not in first],
        options=dict(_options(a.report, b.report)),
        sizes=(sum(s.bytes for s in first.values()), sum(s.bytes for s in second.values())),
        errors=(mean(one.a.error for one in known), mean(one.b.error for one in known)),
    )


def comparable_weights(a: Compiled, b: Compiled) -> list[str]:
    """Linears that both sides store quantized."""
    if a.checkpoint is None or b.checkpoint is None:
        return []
    there = set(b.checkpoint.quantized_names())
    return [name for name in a.checkpoint.quantized_names() if name in there]


def weight_difference(a: Compiled, b: Compiled, name: str) -> float:
    """``|W_b - W_a| / |W_a|`` (Frobenius) of one linear's stored weights.

    Raises:
        CheckpointError: if they have different shapes, or a side does not store it quantized.
    """
    assert a.checkpoint is not None
    assert b.checkpoint is not None
    if a.checkpoint.shape(name) != b.checkpoint.shape(name):
        raise CheckpointError(
            f"linear {name!r} is {a.checkpoint.shape(name)} in {a.path} and {b.checkpoint.shape(name)} in "
            f"{b.path}: these are different models"
        )
    first, second = a.checkpoint.weight(name).dequantize(), b.checkpoint.weight(name).dequantize()
    return float((second - first).norm() / first.norm().clamp(min=1e-30))


def _options(a: Report | None, b: Report | None) -> Iterator[tuple[str, tuple[Any, Any]]]:
    if a is None or b is None:
        return
    first = {**a.config, **{f"calibration {k}": v for k, v in a.calibration.items()}}
    second = {**b.config, **{f"calibration {k}": v for k, v in b.calibration.items()}}
    for key in dict.fromkeys((*first, *second)):
        if first.get(key) != second.get(key):
            yield key, (first.get(key), second.get(key))
