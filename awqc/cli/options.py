"""Options that several commands share, each declared once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

#: Where ``--debug`` is kept for whoever reports errors.
DEBUG = "awqc.debug"


def _remember(context: typer.Context, debug: bool) -> bool:
    context.meta[DEBUG] = debug
    return debug


Model = Annotated[
    Path,
    typer.Argument(
        metavar="MODEL",
        show_default=False,
        help="Directory with config.json and safetensors: a float model or a quantized checkpoint.",
    ),
]
FloatModel = Annotated[
    Path,
    typer.Argument(
        metavar="MODEL", show_default=False, help="Directory of the float model: config.json and safetensors."
    ),
]
Backend = Annotated[
    str, typer.Option(metavar="NAME", help="What runs the linears: auto, or a name from 'awqc backends'.")
]
# Named in full: some versions of typer spell an option as its metavar where the two are one word.
Device = Annotated[
    str, typer.Option("--device", metavar="DEVICE", help="Where to compute: cpu, cuda, cuda:1, ...")
]
Dtype = Annotated[
    str | None,
    typer.Option(
        "--dtype",
        metavar="DTYPE",
        help="Of activations: float32, float16 or bfloat16; float32 on the CPU and the model's own elsewhere "
        "unless given.",
    ),
]
DeviceMap = Annotated[
    str | None,
    typer.Option(
        metavar="MAP",
        help="Instead of --device: auto, balanced, balanced_low_0 or sequential.",
        show_default=False,
    ),
]
MaxMemory = Annotated[
    str | None,
    typer.Option(
        metavar="SIZES",
        help="With --device-map: what weights may take, such as '0=10GB,1=10GB,cpu=30GB'.",
        show_default=False,
    ),
]
MaxUse = Annotated[
    str | None,
    typer.Option(
        metavar="SIZE",
        help="What the compile may use on the device, such as 10GB; of several, as in '0=10GB,cpu=30GB'.",
        show_default=False,
    ),
]
OffloadFolder = Annotated[
    Path | None,
    typer.Option(
        metavar="DIR", help="With --device-map: where weights go that fit in no memory.", show_default=False
    ),
]
Split = Annotated[
    str | None, typer.Option(metavar="NAME", help="Split, where the text is a data set.", show_default=False)
]
Column = Annotated[
    str | None, typer.Option(metavar="NAME", help="Column, where the text has several.", show_default=False)
]
Seed = Annotated[int, typer.Option(help="Of everything random.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of tables.")]
Full = Annotated[bool, typer.Option("--full", help="A row for each linear and group, not for each kind.")]
Debug = Annotated[
    bool, typer.Option("--debug", callback=_remember, help="On an error, show the traceback too.")
]
