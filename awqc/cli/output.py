"""What commands print: results on stdout, everything else on stderr."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from types import TracebackType
from typing import Any, TextIO, TypeVar

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    SpinnerColumn,
    Task,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

T = TypeVar("T")

#: Columns of output that goes to a file or a pipe.
_WIDTH = 100


def stdout() -> Console:
    """Where results go."""
    return _console(typer.get_text_stream("stdout"))


def stderr() -> Console:
    """Where progress, notes and errors go."""
    return _console(typer.get_text_stream("stderr"))


def print_json(document: Any) -> None:
    """One JSON document on stdout."""
    typer.echo(json.dumps(document, indent=2))


def _console(stream: TextIO) -> Console:
    return Console(file=stream, width=None if stream.isatty() else _WIDTH, highlight=False)


class _TimeLeft(TimeRemainingColumn):
    """Nothing where no end is known."""

    def render(self, task: Task) -> Text:
        return Text() if task.total is None else Text.assemble(super().render(task), " left")


class Bars:
    """Progress bars with the time left, on stderr while it is a terminal; an :class:`awqc.context.Progress`.

    Between the loops that report themselves, a bar without an end says what is going on.

    Args:
        what: what goes on until the first loop begins.
    """

    def __init__(self, what: str) -> None:
        console = stderr()
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=30),
            TaskProgressColumn(),
            TimeElapsedColumn(),
            _TimeLeft(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._between = self._progress.add_task(what, total=None)

    def __enter__(self) -> Bars:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def now(self, what: str) -> None:
        """Say what goes on from here to the next loop."""
        self._progress.update(self._between, description=what, visible=True)

    def track(self, items: Sequence[T], what: str) -> Iterable[T]:
        """``items`` in order, one step of a bar each."""
        advance = self.count(what)
        for done, item in enumerate(items):
            advance(done, len(items))
            yield item
        advance(len(items), len(items))

    def count(self, what: str) -> Callable[[int, int], None]:
        """A callback that moves a bar: steps done and steps in all."""
        task = self._progress.add_task(what, total=None, visible=False)

        def advance(done: int, total: int) -> None:
            self._progress.update(task, completed=done, total=total, visible=done < total)
            self._progress.update(self._between, description="working", visible=done >= total)

        return advance
