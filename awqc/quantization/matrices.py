"""What is quantized on its own: the weight of a linear, or of one expert in a stack of them."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from awqc.memory import BATCHED
from awqc.quantized import Grid
from awqc.views import ExpertLinear, Linear
from awqc.weights import Weights


@dataclass(frozen=True)
class Matrix:
    """A weight ``(N, K)`` with inputs of its own.

    Args:
        view: the linear, or the linears of all experts.
        index: which expert; None for a linear.
    """

    view: Linear | ExpertLinear
    index: int | None = None

    @property
    def parameter(self) -> str:
        """Name of the parameter that holds it."""
        return self.view.parameter

    def weight(self, weights: Weights) -> Tensor:
        """Its current value ``(N, K)`` in float32."""
        value = self.view.weight(weights[self.parameter])
        return (value if self.index is None else value[self.index]).float()


def matrices(view: Linear | ExpertLinear) -> list[Matrix]:
    """The matrix of a linear, or those of all experts in their order."""
    if isinstance(view, ExpertLinear):
        return [Matrix(view, index) for index in range(view.count)]
    return [Matrix(view)]


def batches(view: Linear | ExpertLinear, rows: int = 0) -> list[range]:
    """The numbers of the matrices of ``view`` in runs that are handled at once; a linear is one matrix.

    Args:
        rows: ``(rows, K)`` is the largest that is made of a matrix, if that is larger than itself.
    """
    count, width = view.count if isinstance(view, ExpertLinear) else 1, view.in_features
    # Not more than all matrices themselves, so that what it takes is foretold by their size.
    most = min(BATCHED, count * view.out_features * width)
    at_once = max(1, most // (width * max(view.out_features, width, rows)))
    return [range(start, min(start + at_once, count)) for start in range(0, count, at_once)]


def stacked(view: Linear | ExpertLinear, weights: Weights, part: range) -> Tensor:
    """The current values ``(B, N, K)`` in float32 of the matrices numbered ``part``."""
    value = view.weight(weights[view.parameter])
    return (value[part.start : part.stop] if isinstance(view, ExpertLinear) else value[None]).float()


def stacked_grid(view: Linear | ExpertLinear, grid: Grid, part: range) -> Grid:
    """The grids ``(B, N, G)`` of the matrices numbered ``part``, from that of all that ``view`` holds."""
    return grid.some(slice(part.start, part.stop) if isinstance(view, ExpertLinear) else None)
