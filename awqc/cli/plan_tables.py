"""A plan as a person reads it."""

from __future__ import annotations

from collections import Counter

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from awqc import tables
from awqc.planning.plan import Plan, StagePlan


def plan_tables(plan: Plan, full: bool = False) -> RenderableType:
    """Everything that a plan holds, one table after the other."""
    parts = [
        summary(plan),
        stages(plan, full),
        tables.kept(plan.report, full),
        tables.ungrouped(plan.report, full),
        seconds(plan),
        tables.notes(plan.report),
    ]
    return tables.spaced(part for part in parts if part is not None)


def summary(plan: Plan) -> Table:
    """What will be done, and what it takes."""
    report, sizes = plan.report, plan.sizes
    rows = list(report.quantized())
    schemes = Counter(row.scheme for row in rows for _ in range(row.expert_count or 1))
    kept = sum(row.decision != "quantized" for row in report.linears.values())
    table = Table.grid(padding=(0, 2))
    table.title, table.title_justify, table.title_style = "Plan", "left", "bold"
    for name, text in (
        ("calibration", f"{plan.samples} x {plan.seq_len} = {plan.tokens:,} tokens"),
        ("linears", ", ".join([f"{n:,} {scheme}" for scheme, n in schemes.items()] + [f"{kept} kept"])),
        ("coverage", f"{report.coverage:.1%} of the quantized parameters are in a scale group"),
        ("groups", f"{len(report.groups):,} in {len(plan.stages):,} stages"),
        ("read", tables.size(sizes["stored"])),
        ("written", f"{tables.size(sizes['model_after'])} ({tables.size(sizes['model_before'])} in 16 bits)"),
        ("memory", ", ".join(f"{tables.size(size)} of the {place}" for place, size in plan.memory.items())),
        ("disk", f"{tables.size(sum(plan.disk.values()))}, {tables.size(plan.disk['output'])} in the end"),
        ("time", f"{duration(plan.total_seconds)} on {plan.device}"),
    ):
        table.add_row(Text(name, style="bold"), text)
    if plan.refusal:
        table.add_row(Text("refused", style="bold red"), plan.refusal)
    for note in plan.notes:
        table.add_row(Text("note", style="bold"), note)
    return table


def stages(plan: Plan, full: bool = False) -> Table:
    """The stages, those alike in one row."""
    columns = [*([] if full else [">n"]), ">matrices", ">weights", ">K", "Gram", ">memory", ">seconds"]
    table = tables.titled("Stages", "from", *columns)

    def kind(stage: StagePlan) -> tuple[str, ...]:
        name = stage.name if full else tables.pattern(stage.name)
        size = f"{stage.parameters / 1e6:,.1f} M"
        memory = tables.size(stage.memory)
        return name, f"{stage.matrices:,}", size, str(stage.width), stage.statistics, memory

    for key, members in tables.alike(plan.stages, kind):
        name, *shape = key
        spent = sum(sum(stage.seconds.values()) for stage in members)
        table.add_row(name, *([] if full else [str(len(members))]), *shape, f"{spent:.2f}")
    return table


def seconds(plan: Plan) -> Table:
    """Estimated wall time by pass."""
    table = tables.titled("Time", "pass", ">seconds", ">share")
    for name, spent in plan.seconds.items():
        table.add_row(name, f"{spent:.2f}", f"{spent / (plan.total_seconds or 1):.0%}")
    return table


def duration(seconds: float) -> str:
    """Seconds, minutes or hours."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
