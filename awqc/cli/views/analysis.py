"""Scale groups, and how the graph was obtained: from ``config.json`` alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import typer

from awqc import tables
from awqc.analysis import Analysis, analyze
from awqc.cli.models import quiet
from awqc.cli.output import Bars, print_json, stdout


def show_groups(model: Path, full: bool, json: bool) -> None:
    """Who can absorb whose input scale."""
    found = _analyze(model)
    if json:
        print_json(_document(found))
    else:
        stdout().print(tables.analysis(found, full))


def show_capture(model: Path, json: bool) -> None:
    """The ladder: what failed, and what was taken."""
    found = _analyze(model)
    report = found.capture
    if json:
        print_json({"rung": report.rung, "notes": report.notes, "nodes": len(found.graph.nodes)})
        return
    for note in report.notes:
        typer.secho(f"- {note}", fg=typer.colors.YELLOW)
    typer.secho(f"captured by {report.rung}: {len(found.graph.nodes)} ops, {len(found.linears)} linears")
    typer.secho("there are no weights to run: numbers were not compared with eager execution")


def _analyze(model: Path) -> Analysis:
    quiet()
    with Bars("capturing the graph"):
        return analyze(model)


def _document(found: Analysis) -> dict[str, Any]:
    return {
        "groups": [
            {
                "name": group.name,
                "channels": group.channels,
                "alive": int(group.alive.sum()),
                "producers": [part.parameter for part in group.producers],
                "consumers": [part.parameter for part in group.consumers],
                "linears": list(group.linears),
                "refused": [str(refusal) for refusal in group.refused],
            }
            for group in found.groups
        ],
        "linears": {
            name: {"refused": there} if isinstance(there, str) else {"group": there.name}
            for name, there in found.linears.items()
        },
        "capture": found.capture.rung,
    }
