"""State how much of the model has scale groups, and stop before calibration if that is too little.

Coverage is the share of the parameters to be quantized whose linear is in a scale group. What a matrix
product reads but no linear holds stays in float; it is named in the notes, so that nothing is left out in
silence.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

from awqc.context import Context
from awqc.errors import ConfigError
from awqc.graph import Graph
from awqc.pipeline import Pass
from awqc.quantization.schemes import Schemes
from awqc.report import LinearRow
from awqc.scaleflow.coverage import factors

#: Linears that the error names.
_NAMED = 3


@dataclass(frozen=True)
class CheckCoverage(Pass):
    """The contract of ``require_coverage``.

    Raises:
        ConfigError: if the groups cover less than ``require_coverage``.
    """

    name: ClassVar[str] = "check-coverage"
    requires: ClassVar[tuple[type, ...]] = (Schemes,)

    def run(self, graph: Graph, context: Context) -> None:
        report, required = context.report, context.config.require_coverage
        rows = list(report.quantized())
        report.coverage = _share([row for row in rows if row.group is not None], rows)
        for parameter, op in factors(graph).items():
            if parameter not in report.linears:
                report.note(
                    "check-coverage", f"{parameter!r} stays in float: {op} reads it as no linear does"
                )
        if report.coverage < required:
            raise ConfigError(
                f"scale groups cover {report.coverage:.1%} of the parameters to be quantized, less than "
                f"require_coverage={required:g}; without one are {_largest(rows)}; "
                "lower require_coverage, or keep such linears in float"
            )


def _share(part: Iterable[LinearRow], whole: Iterable[LinearRow]) -> float:
    return sum(row.parameters for row in part) / max(sum(row.parameters for row in whole), 1)


def _largest(rows: list[LinearRow]) -> str:
    """The kinds of linear without a group that hold most parameters: how many, one by name, and why."""
    sizes, members = Counter[str](), dict[str, list[LinearRow]]()
    for row in rows:
        if row.group is None:
            kind = ".".join("*" if part.isdigit() else part for part in row.name.split("."))
            sizes[kind] += row.parameters
            members.setdefault(kind, []).append(row)
    return ", ".join(
        f"{len(members[kind])} {kind!r} ({members[kind][0].no_group})"
        for kind, _ in sizes.most_common(_NAMED)
    )
