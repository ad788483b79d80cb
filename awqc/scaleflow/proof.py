"""Proof by execution: random scales are folded, and the model's outputs must not move."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from awqc.capture import relative_error
from awqc.errors import VerifyError
from awqc.graph import Graph
from awqc.scaleflow.groups import ScaleGroup, random_scales

#: Relative error in float64 above which a fold is wrong: far above rounding, far below any real change.
PROOF_BOUND = 1e-9


def prove(graph: Graph, groups: Iterable[ScaleGroup], batch: Mapping[str, Tensor], seed: int = 0) -> float:
    """Fold random scales into all groups at once and compare the outputs in float64.

    Args:
        graph: its weights are not changed.
        groups: what was claimed to be foldable.
        batch: one input of the captured shape.
        seed: of the scales, log-uniform in [1/4, 4].

    Returns:
        The largest relative error of any output.

    Raises:
        VerifyError: if it exceeds :data:`PROOF_BOUND`; names the group that does it alone.
    """
    precise = graph.retyped(torch.float64)
    batch = {k: v.double() if v.is_floating_point() else v for k, v in batch.items()}
    precise.weights = precise.weights.for_checks()
    expected = precise.run(batch)
    groups = list(groups)
    error = _fold_error(precise, groups, batch, expected, seed)
    if error <= PROOF_BOUND:
        return error
    for group in groups:
        alone = _fold_error(precise, [group], batch, expected, seed)
        if not alone <= PROOF_BOUND:
            raise VerifyError(
                f"folding scale group {group.name!r} changes the model's output by {alone:.1e} (relative, "
                f"float64; at most {PROOF_BOUND:.0e} is allowed): a scale rule is wrong; "
                f"leave the group out and report the ops {_ops(group)}"
            )
    raise VerifyError(f"folding all groups changes the output by {error:.1e}, though none does so alone")


def _fold_error(
    graph: Graph, groups: list[ScaleGroup], batch: Mapping[str, Tensor], expected: list[Tensor], seed: int
) -> float:
    generator = torch.Generator().manual_seed(seed)
    weights = graph.weights.like(torch.float64)
    for group in groups:
        group.fold(random_scales(group, generator).to(weights.device), weights)
    found = graph.run(batch, weights)
    return max((relative_error(a, b) for a, b in zip(found, expected, strict=True)), default=0.0)


def _ops(group: ScaleGroup) -> str:
    return ", ".join(sorted({str(n.target) for n in group.values if n.op == "call_function"}))
