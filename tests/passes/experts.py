"""A mixture after passes, and what experts' linears have become."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from awqc.context import Context
from awqc.graph import Graph
from awqc.pipeline import Pass
from tests.mixtures import Mixture
from tests.passes.graphs import run, samples

STACKS = ("first", "second")


def mixed(*passes: Pass, transposed: bool = False, **options: Any) -> tuple[Graph, Context]:
    """The graph of a :class:`Mixture` after ``passes``; every expert has tokens enough."""
    options = {"group_size": 32, "min_expert_tokens": 0, **options}
    return run(Mixture(transposed=transposed), samples(24, tokens=16), *passes, **options)


def original(name: str) -> Tensor:
    """The weights ``(E, N, K)`` before any pass."""
    weight: Tensor = getattr(Mixture(), name)
    return weight.detach()
