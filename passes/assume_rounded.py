"""Codes without values for every linear that a compile would round: for outlines, which have shapes alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from awqc.context import Context
from awqc.graph import Graph
from awqc.pipeline import Pass
from awqc.quantization.schemes import Schemes
from awqc.quantized import Scheme, without_values
from awqc.views import ExpertLinear, Linear, expert_linears, linears
from awqc.weights import Rounded


@dataclass(frozen=True)
class AssumeRounded(Pass):
    """Stands where the passes stand that calibrate, search and round.

    Args:
        schemes: by the name of the linear's module, or of the parameter of experts, where they are known
            already; the others then stay in float.
    """

    name: ClassVar[str] = "assume-rounded"
    requires: ClassVar[tuple[type, ...]] = (Schemes,)
    output: ClassVar = "lossy"

    schemes: Mapping[str, Scheme] | None = None

    def run(self, graph: Graph, context: Context) -> None:
        asked = graph.facts[Schemes]
        views: list[Linear | ExpertLinear] = [*linears(graph)]
        views += expert_linears(graph)
        for view in views:
            name = view.name if isinstance(view, Linear) else view.parameter
            known = asked.get(view.parameter) if self.schemes is None else self.schemes.get(name)
            row = context.report.linears[view.parameter]
            if known is None:
                continue
            row.decision, row.reason, row.scheme = "quantized", "", str(known)
            count = (view.count,) if isinstance(view, ExpertLinear) else ()
            weight = without_values((*count, view.out_features), view.in_features, known)
            graph.weights[view.parameter] = Rounded(weight, view.transposed)
