"""Scales that are applied at run time: what graph, modules and checkpoints call them."""

from __future__ import annotations

import torch
from torch import fx

from awqc.views import is_parameter, operand

#: Of a linear's module name: the vector ``(K,)`` that its input is multiplied by.
PART = "input_scale"
SUFFIX = f".{PART}"


class InputScales(dict[str, str]):
    """Weight of every linear whose input is scaled at run time -> why no fold could do it."""


def input_scale(x: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """The tensor and the vector of which ``x`` is the product, if it is the scaled input of a linear."""
    if x.op != "call_function" or x.target is not torch.ops.aten.mul.Tensor:
        return None
    scaled, scale = operand(x, 0), operand(x, 1)
    if isinstance(scale, fx.Node) and is_parameter(scale) and str(scale.target).endswith(SUFFIX):
        return scaled, scale
    return None
