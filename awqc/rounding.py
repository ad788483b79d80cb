"""Rounding that makes later columns pay for the error of earlier ones (GPTQ, Frantar et al. 2022).

``H`` is the Gram matrix of the inputs. With ``H = (F + I) D (F + I)^T``, ``F`` strictly upper triangular and
``D`` diagonal, the optimal feedback is to add ``(w_i - q_i) F_ij`` to every later column ``j`` once
column ``i`` has been rounded to ``q_i``. This is GPTQ without its matrix inverse (LDLQ, Chee et al. 2023,
theorem 1). The grid is fixed before (scales and zero points come from clipping), so columns can be visited
in any order without an index: most active first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from awqc.quantized import Grid

#: Columns whose mutual compensation is done one by one before the rest is updated with one product.
_BLOCK = 32
#: Dampening as a share of the mean diagonal (the paper's 1%).
DAMPENING = 0.01


def visiting_order(gram: Tensor) -> Tensor:
    """Columns by decreasing energy ``H_ii``: ``(K,)`` indices."""
    return torch.argsort(gram.diagonal(), descending=True, stable=True)


def feedback(gram: Tensor, order: Tensor, dampening: float = DAMPENING) -> Tensor:
    """``F`` of ``P H P^T + damp I = (F + I) D (F + I)^T`` for the permutation ``order``; ``(K, K)``, strictly
    upper triangular (its diagonal and lower part are not to be read).

    Raises the dampening tenfold until the factorization succeeds, so that few tokens (a rank-deficient
    ``H``) cannot fail.
    """
    # With rows and columns reversed the upper factorization is an ordinary Cholesky factorization.
    backwards = order.flip(0)
    damped = gram[backwards][:, backwards]
    diagonal = damped.diagonal()
    mean = diagonal.mean().clamp(min=torch.finfo(damped.dtype).tiny)
    added = 0.0
    while True:
        diagonal.add_((dampening - added) * mean)
        lower, info = torch.linalg.cholesky_ex(damped)
        if int(info) == 0 and bool(torch.isfinite(lower.diagonal()).all()):
            return (lower / lower.diagonal()).flip(0, 1)
        added, dampening = dampening, dampening * 10


@dataclass(frozen=True)
class ColumnGrid:
    """A grid spread over the columns, in the order in which they are visited.

    Args:
        scales, zeros: ``(K, N)``; a scale may be divided by its column's input scale, which rounds
            ``W diag(s)`` while compensating in the basis of ``W``: both are the same.
        levels: number of codes.
    """

    scales: Tensor
    zeros: Tensor
    levels: int

    @staticmethod
    def of(grid: Grid, order: Tensor, columns: Tensor | None = None) -> ColumnGrid:
        """``grid`` for columns visited in ``order``; ``columns`` ``(N, K)`` divides the scales."""
        groups = order // grid.scheme.group(grid.in_features)
        scales, zeros = grid.scales.T[groups], grid.zeros.T[groups]
        if columns is not None:
            scales = scales / columns.T[order]
        return ColumnGrid(scales, zeros, grid.scheme.levels)

    def rows(self, part: range) -> ColumnGrid:
        """The grid of some rows of the weight."""
        some = slice(part.start, part.stop)
        return ColumnGrid(self.scales[:, some], self.zeros[:, some], self.levels)

    @staticmethod
    def stack(grids: Sequence[ColumnGrid]) -> ColumnGrid:
        """The grids of E weights, ``(K, E, N)``."""
        scales, zeros = (torch.stack([getattr(g, part) for g in grids], 1) for part in ("scales", "zeros"))
        return ColumnGrid(scales, zeros, grids[0].levels)


def compensated_codes(weight: Tensor, grid: ColumnGrid, factor: Tensor, order: Tensor) -> Tensor:
    """Codes of ``weight`` ``(N, K)`` with error compensation; or of E weights ``(E, N, K)`` at once, in as
    many steps as one takes.

    Args:
        weight: float32; not changed.
        grid: what the codes stand for.
        factor: ``(K, K)`` from :func:`feedback` for the same ``order``, or ``(E, K, K)``.
        order: ``(K,)`` the order in which columns are rounded, or ``(E, K)``.

    Returns:
        ``(K, N)`` or ``(K, E, N)`` float codes in ``[0, levels - 1]``, in the order of visits.
    """
    # Columns become contiguous rows, so that each step touches one run of memory.
    several = weight.ndim == 3
    if several:
        target = weight.gather(2, order[:, None].expand_as(weight)).movedim(-1, 0).contiguous()
    else:
        target = weight.T[order]
    wanted, codes = target.clone(), torch.empty_like(target)
    errors = torch.empty(_BLOCK, *target.shape[1:], dtype=target.dtype, device=target.device)
    pull = factor.movedim(0, -1).unsqueeze(-1) if several else factor  # (K, K, E, 1)
    top, width = float(grid.levels - 1), target.shape[0]
    for start in range(0, width, _BLOCK):
        end = min(start + _BLOCK, width)
        for i in range(start, end):
            scale, zero, code, error = grid.scales[i], grid.zeros[i], codes[i], errors[i - start]
            torch.div(wanted[i], scale, out=code).round_().add_(zero).clamp_(0.0, top)
            torch.sub(code, zero, out=error).mul_(scale)
            torch.sub(target[i], error, out=error)
            if i + 1 < end and several:
                wanted[i + 1 : end].addcmul_(pull[i, i + 1 : end], error)
            elif i + 1 < end:
                wanted[i + 1 : end].addr_(pull[i, i + 1 : end], error)
        if end < width and several:
            rest, by = wanted[end:].transpose(0, 1), errors[: end - start].transpose(0, 1)
            rest.baddbmm_(factor[:, start:end, end:].mT, by)
        elif end < width:
            wanted[end:].addmm_(factor[start:end, end:].T, errors[: end - start])
    return codes


def descend(codes: Tensor, weight: Tensor, grid: ColumnGrid, gram: Tensor, order: Tensor) -> Tensor:
    """One sweep of coordinate descent: each column's codes become the best given all other columns.

    The loss ``tr(E H E^T)`` never increases. Arguments and result as in :func:`compensated_codes`.
    """
    target = weight.T[order].contiguous()
    permuted = gram[order][:, order]
    codes = codes.clone()
    error = (codes - grid.zeros) * grid.scales - target
    pull = permuted @ error  # (K, N): half the gradient
    top, width = float(grid.levels - 1), target.shape[0]
    diagonal = permuted.diagonal().clamp(min=torch.finfo(torch.float32).tiny).tolist()
    changes = torch.empty(_BLOCK, target.shape[1], dtype=target.dtype, device=target.device)
    for start in range(0, width, _BLOCK):
        end = min(start + _BLOCK, width)
        for i in range(start, end):
            # The error at which the loss is least, the others fixed.
            best = torch.sub(error[i], pull[i], alpha=1.0 / diagonal[i]).add_(target[i])
            code = best.div_(grid.scales[i]).round_().add_(grid.zeros[i]).clamp_(0.0, top)
            change = torch.sub(code, codes[i]).mul_(grid.scales[i])
            codes[i] = code
            changes[i - start] = change
            if i + 1 < end:
                pull[i + 1 : end].addr_(permuted[i, i + 1 : end], change)
        if end < width:
            pull[end:].addmm_(permuted[start:end, end:].T, changes[: end - start])
    return codes


def in_place(codes: Tensor, order: Tensor) -> Tensor:
    """``(K, N)`` codes in the order of visits as ``(N, K)`` in the order of columns."""
    placed = torch.empty_like(codes)
    placed[order] = codes
    return placed.T.contiguous()
