"""Recognize expressions of one parameter that a scale can be folded into.

    e = offset + factor * w     (norms that multiply by 1 + w)

becomes a site: dividing ``e`` by ``s`` stores ``w' = ((offset + factor * w) / s - offset) / factor``. The
graph keeps the expression, so a folded checkpoint loads in code that still computes ``1 + w``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from awqc.context import Context
from awqc.graph import Graph
from awqc.pipeline import Pass
from awqc.scaleflow.sites import Sites, find_sites


@dataclass(frozen=True)
class FoldConstants(Pass):
    """Parameter-only affine expressions become invertible sites."""

    name: ClassVar[str] = "fold-constants"
    provides: ClassVar[tuple[type, ...]] = (Sites,)

    def run(self, graph: Graph, context: Context) -> None:
        graph.facts[Sites] = find_sites(graph)
