"""The code of a node's kernels, to a file or to stdout."""

from __future__ import annotations

from pathlib import Path

import typer

from awqc.cli.output import Bars, print_json
from awqc.errors import ConfigError
from awqc.inspection.code import Form, code
from awqc.inspection.subject import Subject


def show(subject: Subject, name: str, form: Form, out: Path | None, json: bool) -> None:
    """Write it."""
    with Bars("compiling"):
        text = code(subject, name, form)
    if out is not None:
        try:
            out.write_text(text, encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"{out} cannot be written: {error.strerror}") from error
    if json:
        print_json({"node": name, "form": form, "hardware": subject.hardware.name, "code": text})
    elif out is None:
        typer.echo(text, nl=False)
    else:
        typer.echo(f"{out} ({len(text.splitlines()):,} lines of {form} for {subject.hardware.name})")
