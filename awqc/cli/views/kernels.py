"""What every node costs, and where the time goes."""

from __future__ import annotations

from typing import Any

from rich.table import Table

from awqc.cli.output import Bars, print_json, stdout
from awqc.errors import ConfigError
from awqc.inspection.cost import Cost, Rates, costs, total
from awqc.inspection.subject import Subject
from awqc.inspection.timing import is_here, measure, measured_rates, sheet_rates
from awqc.tables import size

#: Rows of the table of nodes unless all are asked for.
_ROWS = 24


def find_costs(subject: Subject, measured: bool, bars: Bars) -> tuple[list[Cost], Rates | None]:
    """Costs of all nodes, with floors from the device that is here or from a data sheet."""
    here = is_here(subject)
    if measured and not here:
        raise ConfigError(f"--measure: {subject.hardware.name} is not here; leave --on out to measure here")
    bars.now("measuring a streaming read")
    rates = measured_rates(subject) if here else sheet_rates(subject)
    found = costs(subject, rates)
    if measured:
        measure(subject, found, bars.count("measuring nodes"))
    return found, rates


def show(subject: Subject, tokens: int, measured: bool, full: bool, json: bool) -> None:
    """Print nodes, then stages, then the whole."""
    with Bars("counting") as bars:
        found, rates = find_costs(subject, measured, bars)
    if json:
        print_json(document(subject, found, rates, tokens))
        return
    out = stdout()
    out.print(_nodes(found, measured, full), "", _stages(found, measured), "", sep="\n")
    out.print(_summary(subject, found, rates, tokens), soft_wrap=True)


def document(subject: Subject, found: list[Cost], rates: Rates | None, tokens: int) -> dict[str, Any]:
    """Plain values, for JSON."""
    return {
        "hardware": subject.hardware.name,
        "tokens": tokens,
        "rates": vars(rates) if rates else None,
        "nodes": [cost.as_dict() for cost in found],
        "stages": [{"stage": stage, **_sums(part)} for stage, part in total(found, _stage).items()],
        "total": _sums(found),
    }


def _stage(cost: Cost) -> str:
    return cost.stage


def _sums(part: list[Cost]) -> dict[str, Any]:
    times = [cost.seconds for cost in part if cost.seconds is not None]
    floors = [cost.floor for cost in part if cost.floor is not None]
    return {
        "nodes": len(part),
        "bytes": sum(cost.bytes for cost in part),
        "moved": sum(cost.moved for cost in part),
        "flops": sum(cost.flops for cost in part),
        "floor": sum(floors) if floors else None,
        "seconds": sum(times) if times else None,
    }


def _table(title: str, *headings: str) -> Table:
    table = Table(title=title, box=None, pad_edge=False)
    table.title_justify, table.title_style = "left", "bold"
    for heading in headings:
        number = heading.startswith(">")
        table.add_column(
            heading.removeprefix(">"), justify="right" if number else "left", no_wrap=number, overflow="fold"
        )
    return table


def _nodes(found: list[Cost], measured: bool, full: bool) -> Table:
    """A row for calls that are alike, the longest together first."""
    alike = total(found, lambda cost: cost.name if full else f"{cost.kind} {cost.shapes} {_runs(cost)}")
    rows = sorted(alike.values(), key=lambda part: -_time(_sums(part)))
    shown = rows if full else rows[:_ROWS]
    hidden = sum(len(part) for part in rows[len(shown) :])
    title = "Nodes" if not hidden else f"Nodes ({hidden} more that take less: --full)"
    timed = [">us", ">x floor"] if measured else []
    table = _table(title, "node", ">n", "kernel", ">launch", ">moved", ">MFLOP", ">floor us", *timed)
    for part in shown:
        first = part[0]
        name = ((first.linear or first.name) if full else first.kind).removeprefix("aten.")
        times = [_us(first.seconds), _over(first.seconds, first.floor)] if measured else []
        table.add_row(
            name,
            str(len(part)),
            "" if _runs(first) == name else _runs(first),
            _launch(first),
            size(first.moved),
            f"{first.flops / 1e6:.1f}" if first.flops else "",
            _us(first.floor),
            *times,
        )
    return table


def _runs(cost: Cost) -> str:
    return " + ".join(dict.fromkeys(launch.kernel.removeprefix("aten.") for launch in cost.launches))


def _launch(cost: Cost) -> str:
    """Grid and block of the first kernel, and its cluster if it has one."""
    first = next((launch for launch in cost.launches if launch.grid), None)
    if first is None:
        return ""
    grid = "x".join(str(n) for n in first.grid if n > 1 or len(first.grid) == 1) or "1"
    cluster = f"/{first.cluster}" if first.cluster > 1 else ""
    return f"{grid}{cluster} x {first.block[0]}"


def _stages(found: list[Cost], measured: bool) -> Table:
    everything = _sums(found)
    timed = [">us", ">x floor"] if measured else []
    table = _table("Stages", "from", ">nodes", ">moved", ">MFLOP", ">floor us", *timed, ">share")
    for stage, part in [*total(found, _stage).items(), ("all", found)]:
        sums = _sums(part)
        times = [_us(sums["seconds"]), _over(sums["seconds"], sums["floor"])] if measured else []
        share = _time(sums) / _time(everything) if _time(everything) else 0.0
        table.add_row(
            stage,
            str(sums["nodes"]),
            size(sums["moved"]),
            f"{sums['flops'] / 1e6:.1f}",
            _us(sums["floor"]),
            *times,
            f"{share:.0%}",
            style="bold" if stage == "all" else "",
        )
    return table


def _summary(subject: Subject, found: list[Cost], rates: Rates | None, tokens: int) -> str:
    sums, plural = _sums(found), "s" if tokens > 1 else ""
    lines = [f"{tokens} token{plural} through the model on {subject.hardware.name}, without past"]
    if rates is None:
        lines.append("no floors: no bandwidth is known of this device")
    else:
        lines.append(f"floors: {rates.source}; of each node the bytes that it must move, or its products")
    for what, seconds in (("at the floor", sums["floor"]), ("as measured, node by node", sums["seconds"])):
        if seconds:
            lines.append(f"{what}: {1e3 * seconds:.3f} ms, {tokens / seconds:,.0f} tokens/s")
    failed = {cost.op: cost.note for cost in found if cost.note}
    lines += [f"not measured: {op}: {why}" for op, why in failed.items()]
    return "\n".join(lines)


def _time(sums: dict[str, Any]) -> float:
    return float(sums["seconds"] or sums["floor"] or sums["moved"])


def _us(seconds: float | None) -> str:
    if seconds is None:
        return ""
    return f"{1e6 * seconds:,.{2 if seconds < 1e-5 else 1 if seconds < 1e-3 else 0}f}"


def _over(seconds: float | None, floor: float | None) -> str:
    return f"{seconds / floor:.2f}" if seconds and floor else ""
