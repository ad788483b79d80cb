"""The ``awqc`` command: its subcommands, and what becomes of the errors they raise."""

from __future__ import annotations

import sys
import traceback
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from awqc import __version__
from awqc.cli.backends import backends
from awqc.cli.compile import compile
from awqc.cli.demo import demo
from awqc.cli.diff import diff
from awqc.cli.evaluate import evaluate
from awqc.cli.export import export
from awqc.cli.generate import generate
from awqc.cli.inspect import inspect
from awqc.cli.options import DEBUG
from awqc.cli.plan import plan
from awqc.cli.report import report
from awqc.errors import AwqcError

#: Exit codes: of a failure that the message explains, of a fault in awqc (EX_SOFTWARE), of Ctrl-C. Usage
#: errors exit with 2.
FAILED, FAULT, INTERRUPTED = 1, 70, 130


class Commands(TyperGroup):
    """A group of commands whose errors become a line on stderr and an exit code."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except AwqcError as error:
            _report(ctx, f"error: {' '.join(str(error).split())}")
            raise typer.Exit(FAILED) from error
        except KeyboardInterrupt as error:
            _report(ctx, f"interrupted: {str(error) or 'nothing half-written is left behind'}")
            raise typer.Exit(INTERRUPTED) from error
        except Exception as error:
            if _is_typers(error):
                raise
            _report(
                ctx,
                f"error: unexpected {type(error).__name__}: {' '.join(str(error).split())}\n"
                "This is a fault in awqc or in a pass or backend of yours; --debug shows where.",
            )
            raise typer.Exit(FAULT) from error


def _is_typers(error: Exception) -> bool:
    """Exits, usage errors and closed pipes, which typer turns into exit codes itself."""
    return hasattr(error, "exit_code") or isinstance(error, (typer.Abort, BrokenPipeError))


def _report(context: typer.Context, message: str) -> None:
    if context.meta.get(DEBUG):
        typer.echo(traceback.format_exc(), err=True)
    typer.secho(message, err=True, fg=typer.colors.RED if sys.stderr.isatty() else None)


app = typer.Typer(
    name="awqc",
    cls=Commands,
    help="The AWQ compiler: any PyTorch or Hugging Face model in, a verified 4-bit model out.",
    epilog="Exit codes: 0 done, 1 failed for the reason given, 2 wrong usage, 70 a fault, 130 Ctrl-C.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for command in (demo, plan, compile, evaluate, generate, inspect, report, diff, export, backends):
    app.command("eval" if command is evaluate else command.__name__)(command)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"awqc {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_version, help="Print the version.")
    ] = False,
) -> None:
    """The AWQ compiler: any PyTorch or Hugging Face model in, a verified 4-bit model out."""


def run() -> None:
    """Entry point of the ``awqc`` script."""
    app(prog_name="awqc")
