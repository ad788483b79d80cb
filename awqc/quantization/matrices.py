"""What is quantized on its own: the weight of a linear, or of one expert in a stack of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

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


def together(view: Linear | ExpertLinear, grids: Sequence[Grid]) -> Grid:
    """The grid of all that ``view`` holds, from those of its matrices."""
    if isinstance(view, Linear):
        return grids[0]
    scales, zeros = (torch.stack([getattr(grid, part) for grid in grids]) for part in ("scales", "zeros"))
    return Grid(scales, zeros, grids[0].scheme, grids[0].in_features)


def apart(view: Linear | ExpertLinear, grid: Grid) -> list[Grid]:
    """Inverse of :func:`together`."""
    if isinstance(view, Linear):
        return [grid]
    return [
        Grid(scales, zeros, grid.scheme, grid.in_features)
        for scales, zeros in zip(grid.scales, grid.zeros, strict=True)
    ]
