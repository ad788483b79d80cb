"""Rounding that makes later columns pay for the error of earlier ones (GPTQ, Frantar et al. 2022).

``H`` is the Gram matrix of the inputs. With ``H = (F + I) D (F + I)^T``, ``F`` strictly upper triangular and
``D`` diagonal, the optimal feedback is to add ``(w_i - q_i) F_ij`` to every later column ``j`` once
column ``i`` has been rounded to ``q_i``. This is GPTQ without its matrix inverse (LDLQ, Chee et al. 2023,
theorem 1). The grid is fixed before (scales and zero points come from clipping), so columns can be visited
in any order without an index: most active first.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from awqc.quantization.columns import (
    BLOCK,
    KERNEL_BLOCK,
    ColumnGrid,
    Columns,
    has_kernel,
    round_block,
    round_block_by_kernel,
)

#: Dampening as a share of the mean diagonal (the paper's 1%).
DAMPENING = 0.01
#: Rows of a Gram matrix that are copied at once.
_COPIED = 512


def visiting_order(gram: Tensor) -> Tensor:
    """Columns by decreasing energy ``H_ii``: ``(K,)`` indices."""
    return torch.argsort(gram.diagonal(), descending=True, stable=True)


def feedback(gram: Tensor, order: Tensor, dampening: float = DAMPENING) -> Tensor:
    """``F`` of ``P H P^T + damp I = (F + I) D (F + I)^T`` for the permutation ``order``; ``(K, K)``, strictly
    upper triangular (its diagonal and lower part are not to be read).

    Raises the dampening tenfold until the factorization succeeds, so that few tokens (a rank-deficient
    ``H``) cannot fail.
    """
    # With rows and columns reversed the upper factorization is an ordinary Cholesky factorization. One matrix
    # is permuted into, factored and turned around in place: there are no larger ones. It lies column by
    # column, as LAPACK and cuSOLVER want it; anything else would be copied for them.
    backwards = order.flip(0)
    lower = gram.new_empty(gram.shape).T
    info = torch.empty((), dtype=torch.int32, device=gram.device)
    _permute(gram, backwards, lower)
    diagonal = lower.diagonal().clone()
    mean = lower.diagonal().mean().clamp(min=torch.finfo(gram.dtype).tiny)
    added = 0.0
    while True:
        diagonal.add_((dampening - added) * mean)
        lower.diagonal().copy_(diagonal)
        torch.linalg.cholesky_ex(lower, out=(lower, info))
        if bool((info == 0) & torch.isfinite(lower.diagonal()).all()):
            break
        added, dampening = dampening, dampening * 10
        _permute(gram, backwards, lower)
    lower.div_(lower.diagonal().clone())
    _reverse(lower.T.view(-1))
    return lower


def _permute(matrix: Tensor, order: Tensor, out: Tensor) -> None:
    """``matrix[order][:, order]`` into ``out``, some rows at a time."""
    for rows, part in zip(order.split(_COPIED), out.split(_COPIED), strict=True):
        # One after the other: both at once would take an int64 for every element.
        part.copy_(matrix.index_select(0, rows).index_select(1, order))


def _reverse(values: Tensor) -> None:
    """Turn a vector around in place; a matrix that lies in it has its rows and columns reversed."""
    size, half = len(values), len(values) // 2
    step = max(1, _COPIED * math.isqrt(size))
    for start in range(0, half, step):
        end = min(start + step, half)
        first, last = values[start:end], values[size - end : size - start]
        turned = first.flip(0)
        first.copy_(last.flip(0))
        last.copy_(turned)


def compensated_codes(weight: Tensor, grid: ColumnGrid, factor: Tensor, order: Tensor) -> Tensor:
    """Codes of ``weight`` ``(N, K)`` with error compensation; or of E weights ``(E, N, K)`` at once, in as
    many steps as one takes.

    Args:
        weight: float32; not changed.
        grid: what the codes stand for.
        factor: ``(K, K)`` from :func:`feedback` for the same ``order``, or ``(E, K, K)``.
        order: ``(K,)`` the order in which columns are rounded, or ``(E, K)``.

    Returns:
        ``(K, N)`` or ``(K, E, N)`` uint8 codes in ``[0, levels - 1]``, in the order of visits.
    """
    columns = Columns.of(weight, order, grid, factor)
    size, step = (KERNEL_BLOCK, round_block_by_kernel) if has_kernel(weight) else (BLOCK, round_block)
    wanted, width = columns.wanted, len(columns.wanted)
    for start in range(0, width, size):
        end = min(start + size, width)
        step(columns, start, end)
        errors, rest = wanted[start:end], wanted[end:]
        if len(rest) and weight.ndim == 3:
            rest.transpose(0, 1).baddbmm_(factor[:, start:end, end:].mT, errors.transpose(0, 1))
        elif len(rest):
            rest.addmm_(factor[start:end, end:].T, errors)
    return columns.codes


def descend(codes: Tensor, weight: Tensor, grid: ColumnGrid, gram: Tensor, order: Tensor) -> Tensor:
    """One sweep of coordinate descent: each column's codes become the best given all other columns.

    The loss ``tr(E H E^T)`` never increases. Arguments and result as in :func:`compensated_codes`.
    """
    target = weight.T[order].contiguous()
    permuted = gram[order][:, order]
    scales, zeros = grid.part(0, len(order))
    codes = codes.clone()
    error = (codes - zeros) * scales - target
    pull = permuted @ error  # (K, N): half the gradient
    top, width = float(grid.levels - 1), target.shape[0]
    diagonal = permuted.diagonal().clamp(min=torch.finfo(torch.float32).tiny).tolist()
    changes = torch.empty(BLOCK, target.shape[1], dtype=target.dtype, device=target.device)
    for start in range(0, width, BLOCK):
        end = min(start + BLOCK, width)
        for i in range(start, end):
            # The error at which the loss is least, the others fixed.
            best = torch.sub(error[i], pull[i], alpha=1.0 / diagonal[i]).add_(target[i])
            code = best.div_(scales[i]).round_().add_(zeros[i]).clamp_(0.0, top)
            change = torch.sub(code, codes[i]).mul_(scales[i])
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
