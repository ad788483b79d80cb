"""Where each group's grid should end: exact loss over a ladder of shrunken ranges.

Clipping narrows a group's range so that the many small weights get finer steps at the expense of the few
large ones (AWQ, Lin et al. 2023, section 4.2). The loss of a candidate is the group's own output error
``e_g^T H_gg e_g``. Only the grid is chosen here: the weight itself is not cut, so that error-compensating
rounding can still spread what falls outside over other columns.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from awqc.quantization.loss import group_losses
from awqc.quantized import Grid, Scheme, grid_from_range, split_groups

#: Shares of the full range that are tried.
SHRINKS = (1.0, 0.92, 0.84, 0.76, 0.68, 0.6)


def clipped_grid(
    weight: Tensor,
    scheme: Scheme,
    blocks: Tensor,
    shrinks: Sequence[float] = SHRINKS,
    columns: Tensor | None = None,
) -> tuple[Grid, Tensor]:
    """The grid with the least loss for every group of every row.

    Args:
        weight: ``(..., N, K)`` float32.
        scheme: bits, group size, symmetry.
        blocks: ``(..., G, g, g)`` diagonal blocks of the Gram matrix, see
            :func:`awqc.quantization.loss.gram_blocks`.
        shrinks: candidates; the first should be 1.0, the unclipped grid.
        columns: ``(..., N, K)`` input scales already multiplied into ``weight``, where ``blocks`` are those
            of the unscaled input.

    Returns:
        The grid, and ``(..., N, G)`` the share of the range that each group keeps.
    """
    width = weight.shape[-1]
    grouped = split_groups(weight, scheme.group(width))
    undo = None if columns is None else split_groups(columns, scheme.group(width)).reciprocal()
    low, high = grouped.amin(-1), grouped.amax(-1)
    best_loss = torch.full_like(low, float("inf"))
    best_low, best_high, share = low.clone(), high.clone(), torch.ones_like(low)
    for shrink in shrinks:
        grid = grid_from_range(low * shrink, high * shrink, scheme, width)
        error = nearest_in_groups(grouped, grid).sub_(grouped)
        if undo is not None:
            error.mul_(undo)
        loss = group_losses(error, blocks)
        better = loss < best_loss
        best_loss = torch.where(better, loss, best_loss)
        best_low = torch.where(better, low * shrink, best_low)
        best_high = torch.where(better, high * shrink, best_high)
        share = torch.where(better, shrink, share)
    return grid_from_range(best_low, best_high, scheme, width), share


def nearest_in_groups(grouped: Tensor, grid: Grid) -> Tensor:
    """``grouped`` ``(..., N, G, g)`` rounded to ``grid`` without spreading scales over columns first."""
    scales, zeros = grid.scales[..., None], grid.zeros[..., None]
    codes = (grouped / scales).round_().add_(zeros).clamp_(0, grid.scheme.levels - 1)
    return codes.sub_(zeros).mul_(scales)
