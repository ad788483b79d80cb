"""``awqc plan``: what a compile will do and take, before any weight is read."""

from __future__ import annotations

from typing import Annotated

import typer

from awqc.cli.options import Backend, Debug, Device, Full, Json, MaxUse, Model
from awqc.cli.output import Bars, print_json, stdout


def plan(
    model: Model,
    bits: Annotated[int, typer.Option(help="Width of a code, 2 to 8.")] = 4,
    group_size: Annotated[
        int, typer.Option(help="Input channels that share a scale; -1 for whole rows.")
    ] = 128,
    keep: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PATTERN",
            help="Linears to leave in float, by name or pattern; may be repeated.",
            show_default=False,
        ),
    ] = None,
    max_calib_samples: Annotated[int, typer.Option(help="Sequences at most.")] = 128,
    max_calib_seq_len: Annotated[int, typer.Option(help="Tokens in a sequence.")] = 512,
    max_memory: MaxUse = None,
    backend: Backend = "auto",
    device: Device = "cpu",
    full: Full = False,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """What compiling MODEL will do and take, from its config.json alone."""
    with Bars("capturing the graph"):
        from awqc.cli.models import check_device, quiet, sizes
        from awqc.cli.plan_tables import plan_tables
        from awqc.config import QuantConfig
        from awqc.planning import plan as plan_model

        quiet()
        found = plan_model(
            model,
            backend=backend,
            config=QuantConfig(bits=bits, group_size=group_size, keep=tuple(keep or ())),
            max_calib_samples=max_calib_samples,
            max_calib_seq_len=max_calib_seq_len,
            device=check_device(device),
            max_memory=sizes(max_memory),
        )
    if json:
        print_json(found.as_dict())
    else:
        stdout().print(plan_tables(found, full))
