"""``awqc inspect``: what the compiler made of a model, or would make of it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from awqc.cli.options import Backend, Debug, Device, Full, Json, Model
from awqc.errors import ConfigError

if TYPE_CHECKING:
    from awqc.inspection.subject import Subject

#: Tokens of the input that a graph is shown with, and with which kernels are: one is a step of decoding.
_GRAPH_TOKENS, _KERNEL_TOKENS = 16, 1


def _view(name: str, help: str) -> Any:
    return typer.Option(name, help=help, show_default=False)


def _named(name: str, metavar: str, help: str) -> Any:
    return typer.Option(name, metavar=metavar, help=help, show_default=False)


def inspect(
    model: Model,
    graph: Annotated[
        bool,
        _view("--graph", "The lowered graph with groups, kernels and refusals; shown by default."),
    ] = False,
    after: Annotated[
        str | None, _named("--after", "PASS", "The graph as a pass leaves it; 'captured' is before all.")
    ] = None,
    change: Annotated[str | None, _named("--change", "PASS", "What a pass does to the graph.")] = None,
    diff: Annotated[
        tuple[str, str] | None,
        _named("--diff", "PASS PASS", "From one pass to another."),
    ] = None,
    linear: Annotated[
        str | None,
        _named("--linear", "NAME", "A linear's statistics, scale, clip, rounding, backend."),
    ] = None,
    kernels: Annotated[
        bool, _view("--kernels", "Each node's kernel, launch, bytes and floor, and where the time goes.")
    ] = False,
    measure: Annotated[bool, _view("--measure", "With --kernels: time every node here, too.")] = False,
    ptx: Annotated[str | None, _named("--ptx", "NODE", "PTX of the kernels of a node or linear.")] = None,
    sass: Annotated[str | None, _named("--sass", "NODE", "Their machine code.")] = None,
    plot: Annotated[
        Path | None,
        _named("--plot", "DIR", "Write PNGs: loss over ratio, error by layer, bandwidth by shape."),
    ] = None,
    report: Annotated[
        bool, _view("--report", "Every decision of the compile that made a checkpoint.")
    ] = False,
    groups: Annotated[
        bool, _view("--groups", "Who can absorb whose input scale; from config.json alone.")
    ] = False,
    capture: Annotated[
        bool, _view("--capture", "How the graph is obtained, and what failed before; no weights.")
    ] = False,
    on: Annotated[
        str | None,
        _named("--on", "GPU", "A GPU that need not be here: h200, a100, rtx_4090, ..."),
    ] = None,
    device: Device = "cpu",
    backend: Backend = "auto",
    tokens: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="N",
            show_default=False,
            help="Of the input; 16 unless given, and 1, a step of decoding, for kernels.",
        ),
    ] = None,
    bits: Annotated[int, typer.Option(help="Of a float model that is lowered without values.")] = 4,
    group_size: Annotated[int, typer.Option(help="Of a float model that is lowered without values.")] = 128,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", metavar="FILE", show_default=False, help="For --ptx and --sass."),
    ] = None,
    full: Full = False,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Look into a checkpoint, or into what a float model would become: of that, config.json is enough."""
    views = {
        "graph": graph,
        "after": after is not None,
        "change": change is not None,
        "diff": diff is not None,
        "linear": linear is not None,
        "kernels": kernels,
        "ptx": ptx is not None,
        "sass": sass is not None,
        "plot": plot is not None,
        "report": report,
        "groups": groups,
        "capture": capture,
    }
    what = _only(views)
    _check(model, measure and not kernels, device if on is not None else "cpu")

    if what == "report":
        from awqc.cli.views import report as report_view

        report_view.show(model, full, json)
    elif what in ("groups", "capture"):
        from awqc.cli.views import analysis

        analysis.show_groups(model, full, json) if groups else analysis.show_capture(model, json)
    elif linear is not None:
        from awqc.cli.views import linear as linear_view
        from awqc.inspection.outline import find_hardware

        linear_view.show(model, linear, find_hardware(on, device), tokens or _KERNEL_TOKENS, json)
    elif what in ("after", "change", "diff"):
        from awqc.cli.views import passes
        from awqc.config import QuantConfig
        from awqc.inspection.outline import find_hardware

        config, at = QuantConfig(bits, group_size), find_hardware(on, device)
        asked = passes.Asked(model, config, backend, at, tokens or _GRAPH_TOKENS)
        if after is not None:
            passes.show_after(asked, after, json)
        else:
            first, second = diff or (passes.before(str(change)), str(change))
            passes.show_diff(asked, first, second, json)
    else:
        shown = tokens or (_GRAPH_TOKENS if what == "graph" else _KERNEL_TOKENS)
        subject = _subject(model, backend, device, on, shown, bits, group_size)
        if what == "kernels":
            from awqc.cli.views import kernels as kernels_view

            kernels_view.show(subject, shown, measure, full, json)
        elif plot is not None:
            from awqc.cli.views import plot as plot_view

            plot_view.show(model, subject, plot, json)
        elif ptx is not None or sass is not None:
            from awqc.cli.views import code

            code.show(subject, str(ptx or sass), "ptx" if ptx is not None else "sass", out, json)
        else:
            from awqc.cli.views import graph as graph_view

            graph_view.show(subject, full, json)


def _only(views: dict[str, bool]) -> str:
    chosen = [name for name, given in views.items() if given]
    if len(chosen) > 1:
        names = [f"--{name}" for name in views]
        raise typer.BadParameter(f"give one of {', '.join(names[:-1])} and {names[-1]}")
    return chosen[0] if chosen else "graph"


def _check(model: Path, measure_alone: bool, device: str) -> None:
    if measure_alone:
        raise typer.BadParameter("--measure goes with --kernels")
    if device != "cpu":
        raise typer.BadParameter("--on is for a GPU that need not be here: leave --device out")
    if not model.is_dir():
        raise ConfigError(f"{model} is not a directory: give a model directory or a quantized checkpoint")


def _subject(
    model: Path, backend: str, device: str, on: str | None, tokens: int, bits: int, group_size: int
) -> Subject:
    from awqc.cli.models import check_device, quiet
    from awqc.cli.output import Bars
    from awqc.config import QuantConfig
    from awqc.inspection.subject import look_at

    quiet()
    check_device(device)
    config = QuantConfig(bits, group_size)
    with Bars("lowering the graph"):
        return look_at(model, backend=backend, device=device, gpu=on, tokens=tokens, config=config)
