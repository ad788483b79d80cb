"""A pass that refuses, before anything is searched, what the checkpoint format could not store."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from awqc.checkpoints import check_format
from awqc.context import Context
from awqc.graph import Graph
from awqc.pipeline import Pass
from awqc.quantization.schemes import Schemes
from awqc.quantized import Scheme
from awqc.views import ExpertLinear, Linear, expert_linears, linears


@dataclass(frozen=True)
class Storable(Pass):
    """Every linear's shape and scheme against the limits of a checkpoint format.

    Args:
        format: name of a registered format.
    """

    name: ClassVar[str] = "check-format"
    requires: ClassVar[tuple[type, ...]] = (Schemes,)

    format: str = "awq"

    def run(self, graph: Graph, context: Context) -> None:
        schemes = graph.facts[Schemes]
        views: list[Linear | ExpertLinear] = [view for view in linears(graph) if view.parameter in schemes]
        views += [view for view in expert_linears(graph) if view.parameter in schemes]
        shapes = {v.name: (v.out_features, v.in_features, schemes[v.parameter]) for v in views}
        heads = [v.name for v in views if any(user.op == "output" for user in v.node.users)]
        check_format(self.format, shapes, heads[0] if heads else None)

    def check_scheme(self, scheme: Scheme) -> None:
        """What can be said without a model: whether the format stores such codes at all.

        Raises:
            CheckpointError: for an unknown format, or if it does not.
        """
        width = 4096 * abs(scheme.group_size)  # shapes that no format minds
        check_format(self.format, {f"a {scheme} linear": (4096, width, scheme)})
