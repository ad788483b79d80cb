"""The report: every linear's decision with its reason, every group's choice, every pass's seconds."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

#: The report in a checkpoint directory.
REPORT_FILE = "awqc_report.json"

Decision = Literal["quantized", "kept", "refused"]


@dataclass
class LinearRow:
    """What happened to one linear.

    Args:
        name: module name.
        out_features, in_features: ``N``, ``K``.
        decision: quantized, kept in float because the user or a rule says so, or refused by awqc.
        reason: why it is kept or refused; empty when quantized.
        scheme: bits, group size and symmetry, readable.
        group: the scale group it belongs to, or None.
        no_group: why it has none, or why its group scales its input at run time.
        energy: ``tr(W H W^T)`` on held-out tokens, what errors are relative to; like them, summed over
            at most :data:`awqc.quantization.loss.GATE_ROWS` evenly spaced output channels.
        nearest_error: relative output error of round-to-nearest on held-out tokens,
            ``tr(E H E^T) / tr(W H W^T)``.
        error: the same of what was stored.
        steps: the same after each pass that changed it, by the pass's name, nearest rounding first.
        input: what is known of its input over the search tokens: ``tokens``; of the mean magnitude of each
            channel the ``median`` and the ``largest``, and the ``channel`` that has it.
        clipped: mean share of each group's range that clipping cut off.
        rounding: how codes were chosen: ``nearest`` or ``compensated``.
        backend: what runs it.
        notes: approximations and fallbacks.
        expert_count: E, where this is one linear of each of E experts; errors are then sums over experts.
        expert_tokens: calibration tokens of each expert that searches used.
        borrowing: experts with too few tokens, searched on the statistics of the whole layer.
    """

    name: str
    out_features: int
    in_features: int
    decision: Decision = "kept"
    reason: str = ""
    scheme: str = ""
    group: str | None = None
    no_group: str = ""
    energy: float | None = None
    nearest_error: float | None = None
    error: float | None = None
    steps: list[tuple[str, float]] = field(default_factory=list)
    input: dict[str, float] = field(default_factory=dict)
    clipped: float | None = None
    rounding: str = ""
    backend: str = ""
    notes: list[str] = field(default_factory=list)
    expert_count: int | None = None
    expert_tokens: list[int] = field(default_factory=list)
    borrowing: int = 0

    @property
    def parameters(self) -> int:
        """Number of weights, ``N * K``, of all experts."""
        return self.out_features * self.in_features * (self.expert_count or 1)


@dataclass
class GroupRow:
    """What the scale search chose for one group.

    Args:
        name: the producer the group is named after.
        linears: names of the linears that undo the scale.
        channels, alive: length of the scale vector, and how many of its channels may differ from 1.
        family, ratio: the candidate that was applied; ``identity`` and 0 when nothing was.
        applied: whether a scale was folded.
        gain: relative decrease of the held-out loss against the identity scale.
        curve: (family, ratio, search loss relative to identity) over the grid.
        scale_range: the smallest and the largest scale that was folded.
        tokens, held_out_tokens: what the decision rests on.
        statistics: how Gram matrices were held: ``full`` on the device, ``offloaded`` to the host, or as
            diagonal blocks and a sample of tokens, ``sampled``; empty if none were taken.
    """

    name: str
    linears: list[str]
    channels: int
    alive: int
    family: str = "identity"
    ratio: float = 0.0
    applied: bool = False
    gain: float = 0.0
    curve: list[tuple[str, float, float]] = field(default_factory=list)
    scale_range: tuple[float, float] | None = None
    tokens: int = 0
    held_out_tokens: int = 0
    statistics: str = ""


@dataclass
class Report:
    """Everything a compile decided and why; :meth:`as_dict` for JSON, :func:`awqc.tables.tables` to read.

    Args:
        capture: rung, checks and notes of the capture.
        calibration: source, samples, sequence length, tokens used and dropped.
        config: the options.
        linears: one row a linear, in the order of the graph.
        groups: one row a scale group.
        coverage: share of the parameters to be quantized whose linear is in a scale group.
        proof: largest relative error of the random-scale proof in float64, and the groups it covered.
        seconds: wall time by pass, in the order they ran.
        processes: seconds that each process of a job spent; empty where there was one.
        notes: (where, what) of everything that was skipped, refused or approximated.
        sizes: bytes of the linears' weights before (at 16 bits) and after, the same of the whole model, and
            what the packed linears occupy in memory on their backends.
    """

    capture: dict[str, Any] = field(default_factory=dict)
    calibration: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    linears: dict[str, LinearRow] = field(default_factory=dict)
    groups: dict[str, GroupRow] = field(default_factory=dict)
    coverage: float = 0.0
    proof: dict[str, Any] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    processes: list[float] = field(default_factory=list)
    notes: list[tuple[str, str]] = field(default_factory=list)
    sizes: dict[str, int] = field(default_factory=dict)

    def add_seconds(self, name: str, seconds: float) -> None:
        """Account for wall time spent in ``name``."""
        self.seconds[name] = self.seconds.get(name, 0.0) + seconds

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Account for the wall time of the block."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.add_seconds(name, time.perf_counter() - start)

    def note(self, where: str, what: str) -> None:
        """Record something skipped, refused or approximated; said once."""
        if (where, what) not in self.notes:
            self.notes.append((where, what))

    def quantized(self) -> Iterator[LinearRow]:
        """Rows of the linears that were quantized."""
        return (row for row in self.linears.values() if row.decision == "quantized")

    def as_dict(self) -> dict[str, Any]:
        """Plain values only."""
        return asdict(self)

    def to_json(self) -> str:
        """The report as JSON text; :meth:`from_json` reads it."""
        return json.dumps(self.as_dict(), indent=1)

    @staticmethod
    def from_json(text: str) -> Report:
        """The report that :meth:`to_json` wrote."""
        values = json.loads(text)
        rest = {k: v for k, v in values.items() if k not in ("linears", "groups", "notes")}
        return Report(
            linears={k: linear_row(v) for k, v in values.get("linears", {}).items()},
            groups={k: group_row(v) for k, v in values.get("groups", {}).items()},
            notes=[(where, what) for where, what in values.get("notes", [])],
            **rest,
        )


def linear_row(values: Mapping[str, Any]) -> LinearRow:
    """A row from its fields in JSON."""
    return LinearRow(**{**values, "steps": [tuple(step) for step in values.get("steps", [])]})


def group_row(values: Mapping[str, Any]) -> GroupRow:
    """A row from its fields in JSON."""
    scales = values.get("scale_range")
    tuples = {
        "curve": [tuple(point) for point in values["curve"]],
        "scale_range": None if scales is None else tuple(scales),
    }
    return GroupRow(**{**values, **tuples})
