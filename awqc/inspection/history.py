"""One linear from its statistics to its kernel: everything a compile found out and decided about it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from awqc.backend import LinearShape, PackedLinear
from awqc.errors import ConfigError
from awqc.inspection.cost import like
from awqc.kernels.hardware import Hardware, assumed
from awqc.kernels.launch import Launch, launches
from awqc.page.data import read_scheme
from awqc.quantized import without_values
from awqc.report import GroupRow, LinearRow, Report
from awqc.runtime.lowering import lower_linear, reasons


@dataclass(frozen=True)
class History:
    """What the report says of one linear, and what its backends say now.

    Args:
        row: of the linear.
        group: its scale group, if it has one.
        backends: by name, best first: why it cannot run the linear; None if it can.
        launches: what a call on ``tokens`` tokens runs, by the first backend that can.
        hardware: what was asked of backends.
        tokens: of the call.
    """

    row: LinearRow
    group: GroupRow | None
    backends: dict[str, str | None]
    launches: list[Launch]
    hardware: Hardware
    tokens: int

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {
            "linear": asdict(self.row),
            "group": asdict(self.group) if self.group else None,
            "backends": self.backends,
            "launches": [launch.as_dict() for launch in self.launches],
            "hardware": self.hardware.name,
            "tokens": self.tokens,
        }


def history(report: Report, name: str, hardware: Hardware, tokens: int = 1) -> History:
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
    scheme = read_scheme(row.scheme)
    if row.decision != "quantized" or scheme is None:
        return History(row, group, {}, [], hardware, tokens)
    dtype = torch.float32 if hardware.type == "cpu" else torch.float16
    device = torch.device(hardware.type)
    shape = LinearShape(row.out_features, row.in_features, scheme, dtype, device, row.expert_count)
    with assumed(hardware):
        backends = reasons(shape)
        count = () if shape.expert_count is None else (shape.expert_count,)
        weight = without_values((*count, shape.out_features), shape.in_features, scheme)
        packed = lower_linear(weight, None, dtype, device).packed
        return History(row, group, backends, _launches(shape, packed, hardware, tokens), hardware, tokens)


def _launches(shape: LinearShape, packed: PackedLinear, hardware: Hardware, tokens: int) -> list[Launch]:
    """Of experts, a token goes to one."""
    x = torch.empty(tokens, shape.in_features, dtype=shape.dtype, device="meta")
    inputs: list[Tensor] = [x]
    if shape.expert_count is not None:
        inputs.append(torch.empty(shape.expert_count, dtype=torch.int32, device="meta"))
    result = x.new_empty(tokens, shape.out_features)
    return launches(packed.op, hardware, [*inputs, *packed.tensors.values(), *packed.constants], result)
