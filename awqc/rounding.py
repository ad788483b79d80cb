"""Rounding that makes later columns pay for the error of earlier ones (GPTQ, Frantar et al. 2022).

``H`` is the Gram matrix of the inputs. With ``H^-1 = U^T U`` (``U`` upper triangular), rounding column
``i`` to ``q`` and subtracting ``(w_i - q) / U_ii * U_i,j`` from every later column ``j`` is the optimal
compensation. The grid is fixed before (scales and zero points come from clipping), so columns can be
visited in any order without an index: most active first.
"""

from __future__ import annotations

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


def inverse_factor(gram: Tensor, order: Tensor, dampening: float = DAMPENING) -> Tensor:
    """``U`` with ``(P H P^T + damp I)^-1 = U^T U`` for the permutation ``order``; ``(K, K)``, float32.

    Raises the dampening tenfold until the factorization succeeds, so that few tokens (a rank-deficient
    ``H``) cannot fail.
    """
    permuted = gram[order][:, order]
    mean = permuted.diagonal().mean().clamp(min=torch.finfo(torch.float32).tiny)
    while True:
        damped = permuted.clone()
        damped.diagonal().add_(dampening * mean)
        # With rows and columns reversed, H = L L^T becomes H = R R^T for the upper triangular R = flip(L),
        # so U = R^-1: one factorization and one triangular solve instead of an inverse and two.
        lower, info = torch.linalg.cholesky_ex(damped.flip(0, 1))
        if int(info) == 0:
            identity = torch.eye(len(damped), dtype=damped.dtype, device=damped.device)
            upper = torch.linalg.solve_triangular(lower, identity, upper=False).flip(0, 1)
            if bool(torch.isfinite(upper).all()):
                return upper
        dampening *= 10


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
        scales = grid.expand(grid.scales)
        if columns is not None:
            scales = scales / columns
        zeros = grid.expand(grid.zeros)
        return ColumnGrid(scales.T[order].contiguous(), zeros.T[order].contiguous(), grid.scheme.levels)


def compensated_codes(weight: Tensor, grid: ColumnGrid, factor: Tensor, order: Tensor) -> Tensor:
    """Codes of ``weight`` ``(N, K)`` with error compensation.

    Args:
        weight: float32; not changed.
        grid: what the codes stand for.
        factor: from :func:`inverse_factor` for the same ``order``.
        order: ``(K,)`` the order in which columns are rounded.

    Returns:
        ``(K, N)`` float codes in ``[0, levels - 1]``, in the order of visits.
    """
    # Columns become contiguous rows, so that each step touches one run of memory.
    left = weight.T[order].contiguous()
    codes = torch.empty_like(left)
    errors = torch.empty(_BLOCK, left.shape[1], dtype=left.dtype, device=left.device)
    top, width = float(grid.levels - 1), left.shape[0]
    inverse_diagonal = (1.0 / factor.diagonal()).tolist()
    for start in range(0, width, _BLOCK):
        end = min(start + _BLOCK, width)
        for i in range(start, end):
            row, scale, zero = left[i], grid.scales[i], grid.zeros[i]
            code = torch.div(row, scale).round_().add_(zero).clamp_(0.0, top)
            codes[i] = code
            error = torch.sub(row, code.sub_(zero).mul_(scale)).mul_(inverse_diagonal[i])
            errors[i - start] = error
            if i + 1 < end:
                left[i + 1 : end].addr_(factor[i, i + 1 : end], error, alpha=-1)
        if end < width:
            left[end:].addmm_(factor[start:end, end:].T, errors[: end - start], alpha=-1)
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
