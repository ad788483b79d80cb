"""``awqc report``: what a compile did, as one HTML page."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from awqc.cli.options import Debug
from awqc.cli.output import Bars
from awqc.errors import AwqcError, ConfigError

if TYPE_CHECKING:
    from awqc.page.graphs import LayerGraph
    from awqc.report import Report


def report(
    checkpoint: Annotated[
        Path,
        typer.Argument(
            metavar="OUT", show_default=False, help="What awqc compile wrote, or the report in it alone."
        ),
    ],
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="FILE", help="The page; one that is there is replaced.")
    ] = Path("report.html"),
    evaluations: Annotated[
        list[Path] | None,
        typer.Option(
            "--eval",
            metavar="FILE",
            show_default=False,
            help="What 'awqc eval OUT --against MODEL --json' printed: perplexity and KL. Repeatable.",
        ),
    ] = None,
    kernels: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            show_default=False,
            help="What 'awqc inspect OUT --kernels --measure --json' printed: kernels, bytes and times.",
        ),
    ] = None,
    title: Annotated[
        str | None,
        typer.Option(metavar="TEXT", show_default=False, help="Of the page; OUT's name unless given."),
    ] = None,
    graph: Annotated[
        bool,
        typer.Option(
            help="Show each layer's graph before and after; loads the checkpoint. Without, the report alone "
            "is read."
        ),
    ] = True,
    debug: Debug = False,
) -> None:
    """Write a page that shows what a compile did: one file that needs no network."""
    from awqc.page.costs import read_costs
    from awqc.page.evaluation import read_evaluation
    from awqc.page.render import render
    from awqc.page.sources import read_report

    found = read_report(checkpoint)
    measured = [read_evaluation(file) for file in evaluations or ()]
    costs = read_costs(kernels) if kernels is not None else None
    about = costs.linears if costs else {}
    graphs = _graphs(checkpoint, found, about) if graph and checkpoint.is_dir() else {}
    page = render(found, title or checkpoint.resolve().name, measured, graphs, costs)
    try:
        output.write_text(page, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{output} cannot be written: {error.strerror}") from error
    typer.echo(f"{output} ({len(page.encode()) / 1e6:.1f} MB)")


def _graphs(checkpoint: Path, report: Report, about: Mapping[str, str]) -> dict[str, LayerGraph]:
    """By layer; none, and a line that says so, where the checkpoint cannot be loaded."""
    from awqc.cli.models import quiet
    from awqc.page.graphs import of_checkpoint

    quiet()
    try:
        with Bars("capturing the graph before and after"):
            return of_checkpoint(checkpoint, report, about)
    except AwqcError as error:
        typer.echo(f"the page shows no graphs: {' '.join(str(error).split())}", err=True)
        return {}
