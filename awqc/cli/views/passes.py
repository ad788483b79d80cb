"""What passes do to the graph: its text after one, or the difference between two."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import typer

from awqc.cli.output import Bars, print_json
from awqc.config import QuantConfig
from awqc.errors import CheckpointError, PipelineError
from awqc.inspection.outline import CAPTURED, Hardware, outline
from awqc.inspection.subject import is_quantized
from awqc.pipeline import Pipeline
from awqc.text import diff_text

_COLOURS = {"+": typer.colors.GREEN, "-": typer.colors.RED, "@": typer.colors.CYAN}


class Asked(NamedTuple):
    """The outline whose passes are looked at."""

    model: Path
    config: QuantConfig
    backend: str
    hardware: Hardware
    tokens: int


def show_after(asked: Asked, name: str, json: bool) -> None:
    """Print the graph as the pass ``name`` leaves it."""
    text = _texts(asked, name)[name]
    if json:
        print_json({"after": name, "graph": text})
    else:
        typer.echo(text, nl=False)


def show_diff(asked: Asked, a: str, b: str, json: bool) -> None:
    """Print how the graph after ``b`` differs from that after ``a``."""
    texts = _texts(asked, a, b)
    found = diff_text(texts[a], texts[b])
    if json:
        print_json({"a": a, "b": b, "diff": found})
        return
    for line in found.splitlines() or [f"the graph after {b} is the graph after {a}"]:
        typer.secho(line, fg=_COLOURS.get(line[:1]))


def before(name: str) -> str:
    """What precedes the pass ``name``, among those that work on the nodes of the graph."""
    _check(name)
    names = [CAPTURED, *(one.name for one in Pipeline.default() if one.scope == "graph")]
    return names[max(names.index(name) - 1, 0)]


def _check(name: str) -> None:
    there = {one.name: one for one in Pipeline.default()}
    if name != CAPTURED and name not in there:
        raise PipelineError(f"no pass is called {name!r}: there are {', '.join([CAPTURED, *there])}")
    if name != CAPTURED and there[name].scope == "stage":
        raise PipelineError(f"{name!r} changes weights, not the graph: its effect is in the report")


def _texts(asked: Asked, *names: str) -> dict[str, str]:
    for name in names:
        _check(name)
    model, config, backend, at, tokens = asked
    if is_quantized(model):
        raise CheckpointError(f"{model} is quantized already: its passes ran on the float model; give that")
    with Bars("running passes on shapes"):
        made = outline(model, config, backend=backend, hardware=at, tokens=tokens, texts_of=names)
    return dict(made.texts)
