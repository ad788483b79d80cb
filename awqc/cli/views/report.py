"""The report of a checkpoint as tables."""

from __future__ import annotations

from pathlib import Path

from awqc import tables
from awqc.cli.output import print_json, stdout
from awqc.page.sources import read_report


def show(model: Path, full: bool, json: bool) -> None:
    """Print it."""
    report = read_report(model)
    if json:
        print_json(report.as_dict())
    else:
        stdout().print(tables.tables(report, full))
