"""The lowered graph, line by line."""

from __future__ import annotations

from collections import Counter

import typer
from rich.table import Table

from awqc.cli.output import print_json, stdout
from awqc.inspection.lines import Segment, document, in_float, refusals, segments
from awqc.inspection.subject import Subject


def show(subject: Subject, full: bool, json: bool) -> None:
    """Print it; layers that are alike once unless ``full``."""
    if json:
        print_json(document(segments(subject, fold=False), subject))
        return
    for segment in segments(subject, fold=not full):
        _show_segment(segment)
    typer.echo("")
    for line in _totals(subject):
        typer.echo(line)
    for table in (_refused(subject), _float(subject)):
        if table is not None:
            stdout().print("", table, sep="\n")


def _show_segment(segment: Segment) -> None:
    if segment.layer:
        alike = f", and alike {_span(segment.alike)}" if segment.alike else ""
        typer.secho(f"\n# {segment.layer}{alike}", fg=typer.colors.CYAN)
    for line in segment.lines:
        typer.echo(line.text)
        if line.about is not None:
            about = str(line.about)
            if segment.alike and line.about.scale:
                about = about.replace(f" ({line.about.scale})", "")  # differs from layer to layer
            typer.secho(f"    # {about}", fg=typer.colors.BRIGHT_BLACK)


def _span(layers: list[str]) -> str:
    """``a.1 to a.7``."""
    return layers[0] if len(layers) == 1 else f"{layers[0]} to {layers[-1]} ({len(layers)})"


def _totals(subject: Subject) -> list[str]:
    ops = Counter(node.op for node in subject.graph.nodes)
    schemes = Counter(str(module.scheme) for module in subject.linears.values())
    backends = Counter(module.backend.name for module in subject.linears.values())
    what = "without values, for" if subject.outlined else "on"
    return [
        f"{ops['call_function']} ops on {ops['get_attr']} tensors, {what} {subject.hardware.name}",
        f"{len(subject.linears)} quantized linears: "
        + ", ".join(f"{n} {scheme}" for scheme, n in schemes.items())
        + "; run by "
        + ", ".join(f"{name} {n}" for name, n in backends.items()),
    ]


def _refused(subject: Subject) -> Table | None:
    table = Table("runs on", "n", "because", title="Backends", box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.title_justify, table.title_style = "left", "bold"
    for backend, reasons in refusals(subject).items():
        if not reasons:
            table.add_row(backend, str(len(subject.linears)), "it is the first that can")
        for why, names in reasons.items():
            table.add_row(backend, str(len(names)), why)
    return table if table.row_count else None


def _float(subject: Subject) -> Table | None:
    table = Table("linear", "why", title="Linears in float", box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.title_justify, table.title_style = "left", "bold"
    for name, why in in_float(subject):
        table.add_row(name, why)
    return table if table.row_count else None
