"""Find who can absorb an input scale, for whom; then prove it by running the graph.

For every group random positive scales are folded and the graph is run before and after in float64. The
largest relative error of any output must stay below 1e-9, or the compile stops.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from awqc.context import Context
from awqc.graph import Graph
from awqc.pipeline import Pass
from awqc.scaleflow.groups import ScaleGroups, find_groups
from awqc.scaleflow.proof import prove
from awqc.scaleflow.sites import Sites


@dataclass(frozen=True)
class FindScaleGroups(Pass):
    """Scale flow over the whole graph.

    Args:
        proof: run the random-scale proof in float64.
    """

    name: ClassVar[str] = "find-scale-groups"
    requires: ClassVar[tuple[type, ...]] = (Sites,)
    provides: ClassVar[tuple[type, ...]] = (ScaleGroups,)

    proof: bool = True

    def run(self, graph: Graph, context: Context) -> None:
        groups = find_groups(graph)
        graph.facts[ScaleGroups] = groups
        batch = context.batches[0] if context.batches else None
        if not self.proof or batch is None:
            context.report.note("find-scale-groups", "the random-scale proof was not run")
            return
        if context.probe is not None:
            graph, batch = context.probe.graph, context.probe.batch
        error = prove(graph, groups, batch, context.config.seed)
        context.report.proof = {"groups": len(groups.groups), "relative_error": error, "dtype": "float64"}
