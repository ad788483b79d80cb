"""One linear's whole history."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from rich.console import Group
from rich.table import Table
from rich.text import Text

from awqc.cli.output import print_json, stdout
from awqc.inspection.history import History, history
from awqc.inspection.outline import Hardware
from awqc.page.sources import read_report
from awqc.report import GroupRow, LinearRow
from awqc.tables import size

#: Width of the bars of the loss curve.
_BAR = 40
_STEPS = {
    "nearest": "rounded to nearest, nothing else done",
    "fold-scales": "after its input scale",
    "clip-weights": "after clipping",
    "round-weights": "after rounding",
}


def show(model: Path, name: str, at: Hardware, tokens: int, json: bool) -> None:
    """Print it."""
    found = history(read_report(model), name, at, tokens)
    if json:
        print_json(found.as_dict())
        return
    stdout().print(Group(*_parts(found)))


def _parts(found: History) -> Iterator[Table | Text | str]:
    row, group = found.row, found.group
    yield Text(row.name, style="bold")
    yield _facts(row)
    if row.steps:
        yield ""
        yield _steps(row)
    if group is not None:
        yield ""
        yield _scale(group)
        if group.curve:
            yield ""
            yield _curve(group)
    if found.backends:
        yield ""
        yield _backends(found)
        yield ""
        yield _kernels(found)


def _grid() -> Table:
    return Table.grid(padding=(0, 2))


def _facts(row: LinearRow) -> Table:
    table = _grid()
    shape = f"{row.out_features} x {row.in_features}"
    if row.expert_count:
        shape = f"{row.expert_count} experts of {shape}"
    table.add_row("shape", shape)
    table.add_row("decision", row.decision + (f": {row.reason}" if row.reason else ""))
    if row.scheme:
        table.add_row("scheme", row.scheme)
    if row.input:
        seen = row.input
        over = seen["largest"] / seen["median"] if seen["median"] else float("inf")
        table.add_row("input", f"{int(seen['tokens']):,} tokens searched on; mean magnitude of a channel")
        table.add_row(
            "",
            f"{seen['median']:.3g} in the median, {seen['largest']:.3g} at most ({over:.1f} times that, "
            f"channel {int(seen['channel'])})",
        )
    if row.expert_tokens:
        few = f"; {row.borrowing} took their layer's" if row.borrowing else ""
        table.add_row("experts' tokens", f"{min(row.expert_tokens):,} to {max(row.expert_tokens):,}{few}")
    if row.clipped is not None:
        table.add_row("clipped", f"{row.clipped:.1%} of the range of a group, in the mean")
    if row.rounding:
        table.add_row("rounding", row.rounding)
    if row.group is None and row.no_group:
        table.add_row("no scale group", row.no_group)
    for note in row.notes:
        table.add_row("note", note)
    return table


def _titled(title: str, *headings: str) -> Table:
    table = Table(title=title, box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.title_justify, table.title_style = "left", "bold"
    for heading in headings:
        number = heading.startswith(">")
        table.add_column(heading.removeprefix(">"), justify="right" if number else "left", no_wrap=number)
    return table


def _steps(row: LinearRow) -> Table:
    """Error after each step, relative to the one before."""
    table = _titled("Relative error of the output, held-out tokens", "", ">error", ">change")
    before: float | None = None
    for name, error in row.steps:
        change = f"{error / before - 1:+.1%}" if before else ""
        table.add_row(_STEPS.get(name, f"after {name}"), f"{error:.3e}", change)
        before = error
    return table


def _scale(group: GroupRow) -> Table:
    table = _titled("Input scale", "", "")
    table.add_row("divides", group.name)
    table.add_row("undone by", ", ".join(group.linears))
    table.add_row("channels", f"{group.alive} of {group.channels} may be scaled")
    if not group.applied:
        table.add_row("chosen", "none: no candidate was better on held-out tokens")
        return table
    table.add_row("chosen", f"{group.family}, ratio {group.ratio:g}; held-out loss {-group.gain:+.1%}")
    if group.scale_range:
        low, high = group.scale_range
        table.add_row("scales", f"{low:.3g} to {high:.3g}")
    table.add_row("tokens", f"{group.tokens:,} searched on, {group.held_out_tokens:,} held out")
    return table


def _curve(group: GroupRow) -> Table:
    """Loss over the grid, as bars."""
    table = _titled("Search loss over the grid, relative to no scale", "family", ">ratio", ">loss", "")
    most = max(loss for _, _, loss in group.curve)
    for family, ratio, loss in group.curve:
        chosen = group.applied and (family, ratio) == (group.family, group.ratio)
        bar = "█" * max(1, round(_BAR * loss / most))
        table.add_row(family, f"{ratio:.2f}", f"{loss:.4f}", f"{bar} ◂ chosen" if chosen else bar)
    return table


def _backends(found: History) -> Table:
    table = _titled(f"Backends on {found.hardware.name}, best first", "backend", "")
    taken = next((name for name, why in found.backends.items() if why is None), None)
    for name, why in found.backends.items():
        table.add_row(name, why or ("takes it" if name == taken else "could run it too"))
    return table


def _kernels(found: History) -> Table:
    plural = "s" if found.tokens > 1 else ""
    title = f"Kernels for {found.tokens} token{plural} on {found.hardware.name}"
    table = _titled(title, "kernel", ">grid x block", ">shared", ">read", ">written", "cut")
    for launch in found.launches:
        grid = "x".join(map(str, launch.grid))
        table.add_row(
            launch.kernel,
            f"{grid} x {launch.block[0]}" if launch.grid else "",
            size(launch.shared) if launch.shared else "",
            size(launch.reads),
            size(launch.writes),
            ", ".join(f"{key} {value}" for key, value in launch.config.items()),
        )
    return table
