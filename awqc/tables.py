"""The report as a person reads it: rich tables that fit 100 columns.

Linears and groups that differ only in a number of their name (``model.layers.3.mlp.up_proj``) are one
kind, ``model.layers.*.mlp.up_proj``, and share a row that holds their means; ``full`` gives each its own.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from statistics import mean
from typing import TYPE_CHECKING, TypeVar

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from awqc.report import GroupRow, LinearRow, Report

if TYPE_CHECKING:
    from awqc.analysis import Analysis
    from awqc.scaleflow.groups import ScaleGroup

T = TypeVar("T")
_NO_NUMBERS = str.maketrans("", "", "_0123456789")


def tables(report: Report, full: bool = False) -> RenderableType:
    """Everything a report holds, one table after the other."""
    parts = [
        summary(report),
        linears(report, full),
        kept(report, full),
        groups(report, full),
        ungrouped(report, full),
        scaled_inputs(report, full),
        seconds(report),
        notes(report),
    ]
    return spaced([part for part in parts if part is not None])


def spaced(parts: Iterable[RenderableType]) -> RenderableType:
    """``parts`` with an empty line between them."""
    lines = [line for part in parts for line in (part, "")]
    return Group(*lines[:-1])


def summary(report: Report) -> Table:
    """What was done and what came of it, in a few lines."""
    table = Table.grid(padding=(0, 2))
    table.title, table.title_justify, table.title_style = "Summary", "left", "bold"
    for name, text in _summary(report):
        table.add_row(Text(name, style="bold"), text)
    return table


def _summary(report: Report) -> Iterable[tuple[str, str]]:
    rows = list(report.quantized())
    if report.calibration:
        c = report.calibration
        unused = f", {c['dropped']:,} not used" if c["dropped"] else ""
        yield (
            "calibration",
            f"{c['samples']} x {c['seq_len']} = {c['tokens']:,} tokens of {c['source']}{unused}",
        )
    if report.capture:
        error = max((error for _, error in report.capture["checks"]), default=0.0)
        agreement = f"differs from eager execution by {error:.0e}" if error else "equal to eager execution"
        yield "capture", f"{report.capture['rung']}; {agreement}"
    if report.proof:
        error = report.proof["relative_error"]
        yield "scale proof", f"{report.proof['groups']} groups, outputs move by {error:.0e} in float64"
    if report.linears:
        schemes = ", ".join(f"{n} {scheme}" for scheme, n in Counter(row.scheme for row in rows).items())
        others = Counter(row.decision for row in report.linears.values() if row.decision != "quantized")
        yield (
            "linears",
            ", ".join([f"{schemes or 'none quantized'}", *(f"{n} {what}" for what, n in others.items())]),
        )
    stacks = [row for row in rows if row.expert_tokens]
    if stacks:
        tokens = [count for row in stacks for count in row.expert_tokens]
        few = sum(row.borrowing for row in stacks)
        borrowing = f"; {few} of {len(tokens)} had too few and took their layer's" if few else ""
        yield "tokens by expert", f"{min(tokens):,} to {max(tokens):,} calibration tokens each{borrowing}"
    if rows:
        yield "coverage", f"{report.coverage:.1%} of the quantized parameters are in a scale group"
    if report.groups:
        applied = [group.gain for group in report.groups.values() if group.applied]
        gain = f", held-out error {mean(applied):.1%} lower there" if applied else ""
        yield "scales", f"applied to {len(applied)} of {len(report.groups)} groups{gain}"
    errors = [(row.nearest_error, row.error) for row in rows if row.nearest_error and row.error is not None]
    if errors:
        nearest, stored = mean(e[0] for e in errors), mean(e[1] for e in errors)
        yield (
            "error",
            f"{stored:.1e} of the linears' outputs, held-out tokens (round-to-nearest {nearest:.1e})",
        )
    if report.sizes:
        s = report.sizes
        yield "linears' weights", f"{size(s['linears_before'])} in 16 bits -> {size(s['linears_after'])}"
        yield "model", f"{size(s['model_before'])} in 16 bits -> {size(s['model_after'])}"
    if report.seconds:
        spent = [f"{each:.1f}" for each in report.processes]
        processes = f", {len(spent)} processes {', '.join(spent)} s" if spent else ""
        yield "time", f"{sum(report.seconds.values()):.1f} s{processes}"


def linears(report: Report, full: bool = False) -> Table | None:
    """Quantized linears: relative output error of what is stored, and how it was reached."""
    rows = list(report.quantized())
    if not rows:
        return None
    # Where schemes differ theirs is the column to see; 100 columns do not hold both.
    several = len({row.scheme for row in rows}) > 1
    headings = ["linear", *_count(full), ">N x K", ">error", ">vs RTN", "scheme" if several else ">clipped"]
    table = titled("Quantized linears", *headings, ">GPTQ", "backend")

    def kind(row: LinearRow) -> tuple[str, ...]:
        return (row.name if full else pattern(row.name), _shape(row), row.scheme, row.backend)

    for (name, shape, scheme, backend), members in alike(rows, kind):
        nearest, error = _mean(r.nearest_error for r in members), _mean(r.error for r in members)
        compensated = sum("compensated" in r.rounding for r in members)
        table.add_row(
            name,
            *([] if full else [str(len(members))]),
            shape,
            "" if error is None else f"{error:.1e}",
            "" if error is None or not nearest else f"{error / nearest - 1:+.0%}",
            scheme if several else _percent(_mean(r.clipped for r in members)),
            f"{compensated}/{len(members)}" if any(r.rounding for r in members) else "",
            backend,
        )
    return table


def kept(report: Report, full: bool = False) -> Table | None:
    """Linears that stay in float, with the reason."""
    rows = [
        (row.name, _shape(row), f"{row.decision}: {row.reason}")
        for row in report.linears.values()
        if row.decision != "quantized"
    ]
    return _reasons("Linears in float", rows, full)


def ungrouped(report: Report, full: bool = False) -> Table | None:
    """Quantized linears without an input scale, with what stands in the way."""
    rows = [(row.name, _shape(row), row.no_group) for row in report.quantized() if row.group is None]
    return _reasons("Linears without a scale group", rows, full)


def scaled_inputs(report: Report, full: bool = False) -> Table | None:
    """Quantized linears whose input is multiplied by a scale at run time, with what no fold could pass."""
    rows = [(row.name, _shape(row), row.no_group) for row in report.quantized() if row.group and row.no_group]
    return _reasons("Linears with an input scale at run time", rows, full)


def groups(report: Report, full: bool = False) -> Table | None:
    """Scale groups: the candidate that won and what it gained on held-out tokens."""
    if not report.groups:
        return None
    table = titled("Scale groups", "producer", "consumers", ">applied", "scales", ">gain")

    def kind(row: GroupRow) -> tuple[str, ...]:
        consumers = ", ".join(dict.fromkeys(name.rpartition(".")[2] for name in row.linears))
        return (row.name if full else pattern(row.name), consumers)

    for (name, consumers), members in alike(report.groups.values(), kind):
        applied = [row for row in members if row.applied]
        table.add_row(
            name.removesuffix(".weight"),
            consumers,
            f"{len(applied)}/{len(members)}",
            _families(applied),
            _percent(_mean(row.gain for row in applied)),
        )
    return table


def analysis(found: Analysis, full: bool = False) -> RenderableType:
    """Scale groups and refusals of a model that was analyzed, not compiled."""
    from awqc.views import expert_linears  # views need torch, which a report does not
    from awqc.views import linears as views_of

    table = titled("Scale groups", "producers", *_count(full), ">channels", "consumers")

    def kind(group: ScaleGroup) -> tuple[str, ...]:
        producers = [part.parameter for part in group.producers]
        first, *others = [pattern(name) if not full else name for name in producers]
        short = [name.rpartition(".")[2] if _module(name) == _module(first) else name for name in others]
        consumers = dict.fromkeys(_module(part.parameter).rpartition(".")[2] for part in group.consumers)
        alive = int(group.alive.sum())
        channels = str(alive) if alive == group.channels else f"{alive} of {group.channels}"
        return ", ".join([first, *short]), channels, ", ".join(consumers)

    for (producers, channels, consumers), members in alike(found.groups, kind):
        table.add_row(producers, *([] if full else [str(len(members))]), channels, consumers)
    shapes = {v.parameter: f"{v.out_features}x{v.in_features}" for v in views_of(found.graph)}
    shapes |= {
        v.parameter: f"{v.count} x {v.out_features}x{v.in_features}" for v in expert_linears(found.graph)
    }
    refused = [
        (name.removesuffix(".weight"), shapes[name], there)
        for name, there in found.linears.items()
        if isinstance(there, str)
    ]
    others = _reasons("Linears without a scale group", refused, full)
    return spaced([table] if others is None else [table, others])


def seconds(report: Report) -> Table | None:
    """Wall time by pass, in the order they ran."""
    if not report.seconds:
        return None
    table = titled("Time", "pass", ">seconds", ">share")
    total = sum(report.seconds.values())
    for name, spent in report.seconds.items():
        table.add_row(name, f"{spent:.2f}", f"{spent / total:.0%}" if total else "")
    return table


def notes(report: Report) -> Table | None:
    """What was skipped or approximated, of the whole and of linears, each said once."""
    table = titled("Notes", "where", "what")
    for where, what in report.notes:
        table.add_row(where, what)
    for what, count in Counter(note for row in report.linears.values() for note in row.notes).items():
        table.add_row(f"{count} linear{'s' if count > 1 else ''}", what)
    return table if table.row_count else None


def size(count: int) -> str:
    """Bytes in decimal units: ``4.92 MB``."""
    value, unit = float(count), "B"
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if value < 1000 or unit == "TB":
            break
        value /= 1000
    return f"{value:.0f} B" if unit == "B" else f"{value:.2f} {unit}"


def titled(title: str, *headings: str) -> Table:
    """A table with these headings; ``>`` aligns a column to the right."""
    table = Table(
        title=title, title_justify="left", title_style="bold", box=None, pad_edge=False, padding=(0, 2, 0, 0)
    )
    for index, heading in enumerate(headings):
        number = heading.startswith(">")
        table.add_column(
            heading.removeprefix(">"), justify="right" if number else "left", no_wrap=number or not index
        )
    return table


def _reasons(title: str, rows: list[tuple[str, str, str]], full: bool) -> Table | None:
    """Name, shape and reason of linears; nodes named in a reason may differ in their number."""
    if not rows:
        return None
    table = titled(title, "linear", *_count(full), ">N x K", "why")

    def kind(row: tuple[str, str, str]) -> tuple[str, ...]:
        name, shape, why = row
        return (name,) if full else (pattern(name), shape, why.translate(_NO_NUMBERS))

    for (name, *_), members in alike(rows, kind):
        _, shape, why = members[0]
        table.add_row(name, *([] if full else [str(len(members))]), shape, why)
    return table


def alike(
    rows: Iterable[T], key: Callable[[T], tuple[str, ...]]
) -> Iterable[tuple[tuple[str, ...], list[T]]]:
    """Rows with the same key together, in the order of their first."""
    found: dict[tuple[str, ...], list[T]] = {}
    for row in rows:
        found.setdefault(key(row), []).append(row)
    return found.items()


def _count(full: bool) -> list[str]:
    return [] if full else [">n"]


def _module(parameter: str) -> str:
    return parameter.rpartition(".")[0]


def pattern(name: str) -> str:
    """The name of a kind: ``a.0.b`` and ``a.1.b`` are ``a.*.b``."""
    return ".".join("*" if part.isdigit() else part for part in name.split("."))


def _shape(row: LinearRow) -> str:
    shape = f"{row.out_features}x{row.in_features}"
    return shape if row.expert_count is None else f"{row.expert_count} x {shape}"


def _families(rows: list[GroupRow]) -> str:
    """Each family that was applied with the range of its ratios."""
    parts = []
    for (family,), members in alike(rows, lambda row: (row.family,)):
        low, high = min(r.ratio for r in members), max(r.ratio for r in members)
        parts.append(f"{family} {low:.2f}" if low == high else f"{family} {low:.2f}-{high:.2f}")
    return ", ".join(parts)


def _mean(values: Iterable[float | None]) -> float | None:
    there = [value for value in values if value is not None]
    return mean(there) if there else None


def _percent(value: float | None) -> str:
    return "" if value is None else f"{value:.1%}"
