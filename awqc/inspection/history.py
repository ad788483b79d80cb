"""One linear from its statistics to its kernel: everything a compile found out and decided about it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch

from awqc.backend import LinearShape
from awqc.errors import ConfigError
from awqc.inspection.cost import like
from awqc.kernels.hardware import Hardware, assumed
from awqc.lowering import reasons
from awqc.page.data import read_scheme
from awqc.report import GroupRow, LinearRow, Report


@dataclass(frozen=True)
class History:
    """What the report says of one linear, and what its backends say now.

    Args:
        row: of the linear.
        group: its scale group, if it has one.
        backends: by name, best first: why it cannot run the linear; None if it can.
        hardware: what was asked of backends.
    """

    row: LinearRow
    group: GroupRow | None
    backends: dict[str, str | None]
    hardware: Hardware

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {
            "linear": asdict(self.row),
            "group": asdict(self.group) if self.group else None,
            "backends": self.backends,
            "hardware": self.hardware.name,
        }


def history(report: Report, name: str, hardware: Hardware) -> History:
    """The history of the linear called ``name``.

    Raises:
        ConfigError: if the report has no such linear.
    """
    rows = {row.name: row for row in report.linears.values()}
    row = rows.get(name) or report.linears.get(name)
    if row is None:
        near = like(list(rows), name)
        hint = f": did you mean {' or '.join(near)}?" if near else ""
        raise ConfigError(f"the report has no linear {name!r}{hint}")
    group = report.groups.get(row.group) if row.group else None
    return History(row, group, _backends(row, hardware), hardware)


def _backends(row: LinearRow, hardware: Hardware) -> dict[str, str | None]:
    scheme = read_scheme(row.scheme)
    if row.decision != "quantized" or scheme is None:
        return {}
    dtype = torch.float32 if hardware.type == "cpu" else torch.float16
    device = torch.device(hardware.type)
    shape = LinearShape(row.out_features, row.in_features, scheme, dtype, device, row.expert_count)
    with assumed(hardware):
        return reasons(shape)
