"""Columns of a weight that are rounded one by one, each knowing the errors of those before it.

On a GPU a kernel does a block of them in one launch (:mod:`awqc.quantization.columns_triton`): one by one,
some eight small ones a column would keep the device waiting for the host.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from awqc.quantized import Grid

#: Columns whose mutual compensation is done one by one before the rest is updated with one product; and those
#: of the kernel, to which a column costs the less the more of them there are.
BLOCK, KERNEL_BLOCK = 32, 128
#: Of these, columns that a program of the kernel has in registers, of which it takes so many at once from
#: those before, and its rows.
_AT_ONCE, _UNROLLED, _ROWS = 32, 8, 32


@dataclass(frozen=True)
class ColumnGrid:
    """A grid by columns, in the order in which they are visited.

    Args:
        scales, zeros: ``(R, N)``, rows that columns share; a scale may be divided by its column's input
            scale, which rounds ``W diag(s)`` while compensating in the basis of ``W``: both are the same.
        rows: ``(K,)`` which of them is that of each column.
        levels: number of codes.
    """

    scales: Tensor
    zeros: Tensor
    rows: Tensor
    levels: int

    @staticmethod
    def of(grid: Grid, order: Tensor, columns: Tensor | None = None) -> ColumnGrid:
        """``grid`` for columns visited in ``order``; ``columns`` ``(N, K)`` divides the scales."""
        groups = order // grid.scheme.group(grid.in_features)
        scales, zeros = grid.scales.T.contiguous(), grid.zeros.T.contiguous()
        if columns is not None:
            scales, zeros = scales[groups] / columns.T[order], zeros[groups]
            groups = torch.arange(len(order), device=order.device)
        return ColumnGrid(scales, zeros, groups, grid.scheme.levels)

    @staticmethod
    def stack(grids: Sequence[ColumnGrid]) -> ColumnGrid:
        """The grids of E weights: scales and zeros ``(R, E, N)``, rows ``(K, E)``."""
        scales, zeros, rows = (
            torch.stack([getattr(grid, part) for grid in grids], 1) for part in ("scales", "zeros", "rows")
        )
        return ColumnGrid(scales, zeros, rows, grids[0].levels)

    def part(self, start: int, end: int) -> tuple[Tensor, Tensor]:
        """Scales and zeros ``(B, N)`` or ``(B, E, N)`` of the columns that are visited from ``start`` on."""
        rows = self.rows[start:end]
        return _taken(self.scales, rows), _taken(self.zeros, rows)


@dataclass(frozen=True)
class Columns:
    """Columns in the order in which they are visited, each of them a row here.

    Args:
        weight: ``(N, K)``, or ``(E, N, K)`` of E weights.
        order: ``(K,)`` or ``(E, K)``.
        grid: what codes stand for.
        factor: ``(K, K)`` or ``(E, K, K)``, what an error adds to later columns.
        wanted: ``(K, N)`` or ``(K, E, N)``, what is to be rounded, compensation included; for columns that
            are rounded, their errors.
        codes: alike, uint8.
    """

    weight: Tensor
    order: Tensor
    grid: ColumnGrid
    factor: Tensor
    wanted: Tensor
    codes: Tensor

    @staticmethod
    def of(weight: Tensor, order: Tensor, grid: ColumnGrid, factor: Tensor) -> Columns:
        """The columns of ``weight`` before any of them is rounded."""
        wanted = _visited(weight, order)
        return Columns(weight, order, grid, factor, wanted, torch.empty_like(wanted, dtype=torch.uint8))

    def target(self, start: int, end: int) -> Tensor:
        """The weights ``(B, N)`` or ``(B, E, N)`` of the columns visited from ``start`` to ``end``."""
        return _visited(self.weight, self.order[..., start:end])


def _visited(weight: Tensor, order: Tensor) -> Tensor:
    """The columns ``order`` of ``weight`` as contiguous rows, so that each step touches one run of memory."""
    return _taken(weight.movedim(-1, 0), order.movedim(-1, 0))


def _taken(values: Tensor, rows: Tensor) -> Tensor:
    """``rows`` ``(B,)`` of ``values`` ``(R, N)``; or ``(B, E)`` of ``(R, E, N)``, of each weight its own."""
    if values.ndim == 2:
        return values.index_select(0, rows)
    return values.gather(0, rows.unsqueeze(-1).expand(*rows.shape, values.shape[-1]))


def round_block(columns: Columns, start: int, end: int) -> None:
    """Round the columns visited from ``start`` to ``end``: their codes, and their errors in the place of what
    was wanted. Errors are added to the columns of the block only."""
    wanted, codes = columns.wanted[start:end], columns.codes[start:end]
    target = columns.target(start, end)
    scales, zeros = columns.grid.part(start, end)
    pull, top = columns.factor[..., start:end, start:end], float(columns.grid.levels - 1)
    pull = pull.movedim((-2, -1), (0, 1)).unsqueeze(-1)  # (B, B, 1) or (B, B, E, 1)
    for i in range(len(wanted)):
        scale, zero = scales[i], zeros[i]
        code = torch.div(wanted[i], scale).round_().add_(zero).clamp_(0.0, top)
        codes[i] = code
        error = torch.sub(target[i], code.sub_(zero).mul_(scale), out=wanted[i])
        if i + 1 < len(wanted):
            wanted[i + 1 :].addcmul_(pull[i, i + 1 :], error)


def has_kernel(weight: Tensor) -> bool:
    """Whether :func:`round_block_by_kernel` can round ``weight``: elsewhere :func:`round_block` does."""
    return weight.is_cuda and weight.dtype == torch.float32 and importlib.util.find_spec("triton") is not None


def round_block_by_kernel(columns: Columns, start: int, end: int) -> None:
    """:func:`round_block` in one launch; with the bits of the device's own ops."""
    from awqc.quantization.columns_triton import round_columns

    target, factor, grid = columns.target(start, end), columns.factor, columns.grid
    experts = target.shape[1] if target.ndim == 3 else 1
    n = target.shape[-1]
    with torch.cuda.device_of(target):
        round_columns[(-(-n // _ROWS), experts)](
            target,
            columns.wanted,
            grid.scales,
            grid.zeros,
            grid.rows,
            factor,
            columns.codes,
            start,
            end - start,
            n,
            factor.stride(0) if factor.ndim == 3 else 0,
            *factor.stride()[-2:],
            top=float(grid.levels - 1),
            at_once=_AT_ONCE,
            unrolled=_UNROLLED,
            block_n=_ROWS,
            num_warps=1,
            # Products and sums are rounded apart, as torch does, but where the kernel says otherwise.
            enable_fp_fusion=False,
        )
