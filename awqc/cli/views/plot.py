"""Plots of a checkpoint's report, and of what its nodes cost."""

from __future__ import annotations

from pathlib import Path

import typer

from awqc.cli.output import Bars, print_json
from awqc.inspection.cost import costs
from awqc.inspection.subject import Subject
from awqc.inspection.timing import is_here, measure, measured_rates
from awqc.page.plots import write_plots
from awqc.page.sources import read_report
from awqc.report import REPORT_FILE, Report


def show(model: Path, subject: Subject, folder: Path, json: bool) -> None:
    """Write PNGs to ``folder`` and name them; linears are measured if their device is here."""
    with Bars("measuring linears") as bars:
        found, rates = [], None
        if is_here(subject):
            rates = measured_rates(subject)
            found = [cost for cost in costs(subject, rates) if cost.linear is not None]
            measure(subject, found, bars.count("measuring linears"))
        bars.now("drawing")
        report = read_report(model) if (model / REPORT_FILE).is_file() else Report()
        files = write_plots(report, folder, found, rates)
    if json:
        print_json({"files": [str(file) for file in files]})
        return
    for file in files:
        typer.echo(str(file))
