"""``awqc inspect``: scale groups, graph, one pass's rewrite, or the report of a checkpoint."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from awqc.cli.options import Debug, Full, Json, Model
from awqc.cli.output import Bars, print_json, stdout
from awqc.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    from awqc.analysis import Analysis
    from awqc.pipeline import Pipeline

_COLOURS = {"+": typer.colors.GREEN, "-": typer.colors.RED, "@": typer.colors.CYAN}
#: Length of the input that graphs are captured with.
_TOKENS = 16


def inspect(
    model: Model,
    groups: Annotated[
        bool, typer.Option("--groups", help="Who can absorb whose input scale; from config.json alone.")
    ] = False,
    capture: Annotated[
        bool, typer.Option("--capture", help="How the graph is obtained, and what failed before; no weights.")
    ] = False,
    report: Annotated[
        bool, typer.Option("--report", help="Every decision of the compile that made a checkpoint.")
    ] = False,
    graph: Annotated[
        bool, typer.Option("--graph", help="The graph; of a quantized checkpoint, the lowered one.")
    ] = False,
    diff: Annotated[
        str | None,
        typer.Option("--diff", metavar="PASS", help="What a pass does to the graph.", show_default=False),
    ] = None,
    full: Full = False,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Look into a model or a checkpoint; the report if there is one, else the scale groups."""
    from awqc.report import REPORT_FILE

    wanted = {
        "groups": groups,
        "capture": capture,
        "report": report,
        "graph": graph,
        "diff": diff is not None,
    }
    chosen = [name for name, given in wanted.items() if given]
    if len(chosen) > 1:
        raise typer.BadParameter("give one of --groups, --capture, --report, --graph and --diff")
    what = chosen[0] if chosen else "report" if (model / REPORT_FILE).is_file() else "groups"
    if what == "report":
        _show_report(model / REPORT_FILE, full, json)
    elif what == "groups":
        _show_groups(model, full, json)
    elif what == "capture":
        _show_capture(model, json)
    else:
        with Bars("capturing the graph"):
            text = _graph(model) if diff is None else _diff(model, diff)
        _show_text(text, what, json)


def _show_report(file: Path, full: bool, json: bool) -> None:
    from awqc import tables
    from awqc.report import Report

    if not file.is_file():
        raise CheckpointError(
            f"{file.parent} has no {file.name}: only checkpoints that awqc has written hold one"
        )
    try:
        report = Report.from_json(file.read_text(encoding="utf-8"))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{file} is damaged, or of another version of awqc: {error}") from error
    if json:
        print_json(report.as_dict())
    else:
        stdout().print(tables.tables(report, full))


def _show_groups(model: Path, full: bool, json: bool) -> None:
    from awqc import tables

    with Bars("capturing the graph"):
        found = _analyze(model)
    if json:
        print_json(_groups_document(found))
    else:
        stdout().print(tables.analysis(found, full))


def _show_capture(model: Path, json: bool) -> None:
    """The ladder: what failed, and what was taken."""
    with Bars("capturing the graph"):
        found = _analyze(model)
    report = found.capture
    if json:
        print_json({"rung": report.rung, "notes": report.notes, "nodes": len(found.graph.nodes)})
        return
    for note in report.notes:
        typer.secho(f"- {note}", fg=typer.colors.YELLOW)
    typer.secho(f"captured by {report.rung}: {len(found.graph.nodes)} ops, {len(found.linears)} linears")
    typer.secho("there are no weights to run: numbers were not compared with eager execution")


def _show_text(text: str, what: str, json: bool) -> None:
    if json:
        print_json({what: text})
        return
    for line in text.splitlines():
        typer.secho(line, fg=_COLOURS.get(line[:1]) if what == "diff" else None)


def _analyze(model: Path) -> Analysis:
    from awqc.analysis import analyze
    from awqc.cli.models import quiet

    quiet()
    return analyze(model)


def _ids() -> Any:
    import torch

    return torch.arange(_TOKENS)[None] % 2


def _graph(model: Path) -> str:
    from awqc.checkpoints import open_checkpoint
    from awqc.cli.models import quiet
    from awqc.loading import load
    from awqc.text import graph_text

    quiet()
    quantized = any(model.glob("*.safetensors")) and open_checkpoint(model).format is not None
    return graph_text(load(model).graph.graph) if quantized else _analyze(model).graph.text()


def _diff(model: Path, name: str) -> str:
    """The unified diff of the graph's text that the pass ``name`` makes."""
    from awqc.cli.models import quiet
    from awqc.pipeline import Pipeline

    quiet()
    pipeline = Pipeline.default()
    there = {current.name: current for current in pipeline}
    if name not in there:
        raise ConfigError(f"no pass is called {name!r}: there are {', '.join(there)}")
    if there[name].scope == "stage":
        raise ConfigError(f"{name!r} changes weights, not the graph: its effect is in the report")
    with tempfile.TemporaryDirectory() as folder:
        upto = pipeline.passes[: pipeline.names().index(name) + 1]
        if any(current.scope == "stage" for current in upto):
            _run_with_weights(model, name, Path(folder))
        else:
            _run_without_weights(model, name, Path(folder), Pipeline(upto))
        found = (Path(folder) / f"{name}.diff").read_text(encoding="utf-8")
    return found or f"{name} leaves the nodes of the graph as they are"


def _run_without_weights(model: Path, name: str, folder: Path, pipeline: Pipeline) -> None:
    from awqc.calibration import example_inputs
    from awqc.capture import capture
    from awqc.config import QuantConfig
    from awqc.context import Context
    from awqc.flags import Flags
    from awqc.source import from_module, skeleton

    module = skeleton(model)
    captured = capture(from_module(module), example_inputs(module), None)
    pipeline.run(captured, Context(QuantConfig()), Flags(dump=frozenset({name}), dump_to=folder, check=False))


def _run_with_weights(model: Path, name: str, folder: Path) -> None:
    """A compile without any search: what is rewritten does not depend on it."""
    from awqc.api import compile
    from awqc.flags import Flags
    from awqc.pipeline import Pipeline

    pipeline = Pipeline.default().remove("search-scales").remove("fold-scales").remove("clip-weights")
    pipeline = pipeline.with_options("round-weights", method="nearest")
    flags = Flags(dump=frozenset({name}), dump_to=folder, check=False)
    compile(model, _ids(), pipeline=pipeline, flags=flags)


def _groups_document(found: Analysis) -> dict[str, Any]:
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
