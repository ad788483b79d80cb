"""Rounding that makes later columns pay for the error of earlier ones (GPTQ, Frantar et al. 2022).

``H`` is the Gram matrix of the inputs. With ``H^-1 = U^T U`` (``U`` upper triangular), rounding column
``i`` to ``q`` and subtracting ``(w_i - q) / U_ii * U_i,j`` from every later column ``j`` is the optimal
compensation. The grid is fixed before (scales and zero points come from clipping), so columns can be
visited in any order without an index: most active first.
"""

from __future__ import annotations

import torch
from torch import Tensor

from awqc.quantized import Grid

#: Columns whose mutual compensation is done one by one before the rest is updated with one product.
_BLOCK = 128
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
    permuted = gram[order][:, order].double() if gram.device.type == "cpu" and gram.shape[0] <= 512 else gram[order][:, order]
    mean = permuted.diagonal().mean().clamp(min=torch.finfo(torch.float32).tiny)
    while True:
        damped = permuted.clone()
        damped.diagonal().add_(dampening * mean)
        lower, info = torch.linalg.cholesky_ex(damped)
        if int(info) == 0:
            inverse = torch.cholesky_inverse(lower)
            upper, info = torch.linalg.cholesky_ex(inverse, upper=True)
            if int(info) == 0 and bool(torch.isfinite(upper).all()):
                return upper.float()
        dampening *= 10


def compensated_codes(weight: Tensor, grid: Grid, factor: Tensor, order: Tensor) -> Tensor:
    """Codes of ``weight`` ``(N, K)`` on ``grid`` with error compensation.

    Args:
        weight: float32; not changed.
        grid: scales and zero points per group of the original column order.
        factor: from :func:`inverse_factor` for the same ``order``.
        order: ``(K,)`` the order in which columns are rounded.

    Returns:
        ``(N, K)`` float codes in ``[0, levels - 1]``, in the original column order.
    """
    # Columns become contiguous rows, so that each step touches one run of memory.
    left = weight.T[order].contiguous()
    scales = grid.expand(grid.scales).T[order].contiguous()
    zeros = grid.expand(grid.zeros).T[order].contiguous()
    codes = torch.empty_like(left)
    errors = torch.empty(_BLOCK, left.shape[1], dtype=left.dtype, device=left.device)
    top, width = float(grid.scheme.levels - 1), left.shape[0]
    inverse_diagonal = (1.0 / factor.diagonal()).tolist()
    for start in range(0, width, _BLOCK):
        end = min(start + _BLOCK, width)
        for i in range(start, end):
            row = left[i]
            code = torch.div(row, scales[i]).round_().add_(zeros[i]).clamp_(0.0, top)
            codes[i] = code
            error = torch.sub(row, code.sub_(zeros[i]).mul_(scales[i])).mul_(inverse_diagonal[i])
            errors[i - start] = error
            if i + 1 < end:
                left[i + 1 : end].addr_(factor[i, i + 1 : end], error, alpha=-1)
        if end < width:
            left[end:].addmm_(factor[start:end, end:].T, errors[: end - start], alpha=-1)
    back = torch.empty_like(order)
    back[order] = torch.arange(width, device=order.device)
    return codes[back].T.contiguous()
