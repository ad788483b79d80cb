"""Scales at run time, where no parameter in front of a linear can absorb one.

    aten.linear(x, W, b)  ->  aten.linear(x * r, W, b)      r = 1, a parameter of its own

From there everything is as for any other group: scale flow finds that ``r`` can be divided for all linears
that read ``x * r``, the fold is proven, the scale is searched on the same statistics, and it is applied if it
beats no scale on held-out tokens. What it costs is a multiplication of the input at run time.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from awqc.context import Context
from awqc.graph import Graph
from awqc.passes.quantize_linears import parameter
from awqc.pipeline import Pass
from awqc.runtime.input_scales import SUFFIX, InputScales
from awqc.scaleflow.groups import find_groups
from awqc.views import Linear, linears, shape


@dataclass(frozen=True)
class ScaleInputs(Pass):
    """A multiplier of one in front of every linear without a scale group, if ``config.input_scales``.

    Linears that read the same tensor share it. Which of them will be quantized is not known yet: the pass
    ``drop-unit-scales`` takes back what was of no use.
    """

    name: ClassVar[str] = "scale-inputs"
    provides: ClassVar[tuple[type, ...]] = (InputScales,)

    def run(self, graph: Graph, context: Context) -> None:
        graph.facts[InputScales] = found = InputScales()
        if not context.config.input_scales:
            return
        refusals = find_groups(graph).refusals
        scaled: dict[fx.Node, fx.Node] = {}
        for view in list(linears(graph)):
            if view.parameter in refusals:
                found[view.parameter] = refusals[view.parameter]
                if view.x not in scaled:
                    scaled[view.x] = _scaled(graph, view)
                view.node.update_arg(0, scaled[view.x])
        if scaled:
            graph.changed()


def _scaled(graph: Graph, view: Linear) -> fx.Node:
    """``x * r`` in front of the linear, its first reader."""
    x = view.x
    ones = torch.ones(shape(x)[-1], dtype=x.meta["val"].dtype)
    scale = parameter(graph, view.name + SUFFIX, ones, before=view.node)
    with graph.fx.inserting_before(view.node):
        node = graph.fx.call_function(torch.ops.aten.mul.Tensor, (x, scale))
    node.meta["val"] = x.meta["val"]
    return node
