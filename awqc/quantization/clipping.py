"""Where each group's grid should end: exact loss over a ladder of shrunken ranges.

Clipping narrows a group's range so that the many small weights get finer steps at the expense of the few
large ones (AWQ, Lin et al. 2023, section 4.2). The loss of a candidate is the group's own output error
``e_g^T H_gg e_g``. Only the grid is chosen here: the weight itself is not cut, so that error-compensating
rounding can still spread what falls outside over other columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

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
    # The grids of all candidates at once: what is as large as the weight is one candidate's at a time.
    shares = _on(low.device, tuple(shrinks))
    ranges = shares.view(-1, *[1] * low.ndim)
    grids = grid_from_range(low * ranges, high * ranges, scheme, width)
    losses = torch.empty_like(grids.scales)
    for loss, grid in zip(losses, grids.each(), strict=True):
        error = grid.nearest_in_groups(grouped).sub_(grouped)
        if undo is not None:
            error.mul_(undo)
        loss.copy_(group_losses(error, blocks))
    best = losses.nan_to_num_(nan=torch.inf, posinf=torch.inf).argmin(0, keepdim=True)
    scales, zeros = (each.gather(0, best)[0] for each in (grids.scales, grids.zeros))
    return Grid(scales, zeros, scheme, width), shares[best[0]]


@cache
def _on(device: torch.device, shrinks: tuple[float, ...]) -> Tensor:
    """Candidates where they are compared; sent there once, since sending waits for all that is queued."""
    return torch.tensor(shrinks, dtype=torch.float32, device=device)
