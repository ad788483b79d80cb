"""``awqc backends``: what there is, and what of it runs here."""

from __future__ import annotations

from awqc.cli.options import Debug, Device, Json
from awqc.cli.output import print_json, stdout

_SHAPE = (4096, 4096)


def backends(device: Device = "cpu", json: Json = False, debug: Debug = False) -> None:
    """List the backends, and whether each runs a typical 4-bit linear on this machine."""
    import torch
    from rich.table import Table

    from awqc.backend import LinearShape, get_backend
    from awqc.backend import backends as registered
    from awqc.cli.models import check_device
    from awqc.quantized import Scheme

    place = check_device(device)
    dtype = torch.float32 if place.type == "cpu" else torch.float16
    shape = LinearShape(*_SHAPE, Scheme(), dtype, place)
    rows = {
        name: {"priority": cls.priority, "refuses": get_backend(name).refuses(shape)}
        for name, cls in sorted(registered().items(), key=lambda item: -item[1].priority)
    }
    if json:
        print_json(
            {"device": str(place), "linear": [*_SHAPE, str(shape.scheme), str(dtype)], "backends": rows}
        )
        return
    table = Table(
        "backend", "priority", f"a {_SHAPE[0]}x{_SHAPE[1]} linear of {shape.scheme} on {place}", box=None
    )
    for name, row in rows.items():
        table.add_row(name, str(row["priority"]), str(row["refuses"] or "runs"))
    stdout().print(table)
