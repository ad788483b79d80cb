"""Rounding that makes later columns pay for the error of earlier ones (GPTQ, Frantar et al. 2022).

``H`` is the Gram matrix of the inputs. With ``H = (F + I) D (F + I)^T``, ``F`` strictly upper triangular and
``D`` diagonal, the optimal feedback is to add ``(w_i - q_i) F_ij`` to every later column ``j`` once
column ``i`` has been rounded to ``q_i``. This is GPTQ without its matrix inverse (LDLQ, Chee et al. 2023,
theorem 1). The grid is fixed before (scales and zero points come from clipping), so columns can be visited
in any order without an index: most active first.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from awqc.quantized import Grid

#: Columns whose mutual compensation is done one by one before the rest is updated with one product.
_BLOCK = 32
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
    wanted = target.clone()  # and when a column is rounded, its codes
    errors = torch.empty(_BLOCK, *target.shape[1:], dtype=target.dtype, device=target.device)
    pull = factor.movedim(0, -1).unsqueeze(-1) if several else factor  # (K, K, E, 1)
    top, width = float(grid.levels - 1), target.shape[0]
    step: Callable[[_Block], None] = _round_block
    if _is_recorded(target):
        step = _Recorded(_Block.empty(_BLOCK, target, pull, top))
    for start in range(0, width, _BLOCK):
        end = min(start + _BLOCK, width)
        block = _Block(
            wanted[start:end],
            target[start:end],
            grid.scales[start:end],
            grid.zeros[start:end],
            pull[start:end, start:end],
            errors[: end - start],
            top,
        )
        (step if end - start == _BLOCK else _round_block)(block)
        if end < width and several:
            rest, by = wanted[end:].transpose(0, 1), errors[: end - start].transpose(0, 1)
            rest.baddbmm_(factor[:, start:end, end:].mT, by)
        elif end < width:
            wanted[end:].addmm_(factor[start:end, end:].T, errors[: end - start])
    return wanted


@dataclass(frozen=True)
class _Block:
    """Columns that are rounded one by one, each as a row here: all tensors ``(B, N)`` or ``(B, E, N)``.

    Args:
        wanted: what is left to be rounded, compensation included; codes take its place.
        target: the weights themselves.
        scales, zeros: of their grids.
        pull: ``(B, B)`` or ``(B, B, E, 1)``, the feedback among them.
        errors: what comes out for later columns.
        top: the largest code.
    """

    wanted: Tensor
    target: Tensor
    scales: Tensor
    zeros: Tensor
    pull: Tensor
    errors: Tensor
    top: float

    @staticmethod
    def empty(size: int, target: Tensor, pull: Tensor, top: float) -> _Block:
        """Memory for blocks of ``size`` columns of ``target``."""
        wanted, given, scales, zeros, errors = (torch.ones_like(target[:size]) for _ in range(5))
        return _Block(wanted, given, scales, zeros, torch.zeros_like(pull[:size, :size]), errors, top)

    def inputs(self) -> tuple[Tensor, ...]:
        """What is read."""
        return self.wanted, self.target, self.scales, self.zeros, self.pull


def _round_block(block: _Block) -> None:
    wanted, pull = block.wanted, block.pull
    for i in range(len(wanted)):
        scale, zero, error = block.scales[i], block.zeros[i], block.errors[i]
        code = wanted[i].div_(scale).round_().add_(zero).clamp_(0.0, block.top)
        torch.sub(code, zero, out=error).mul_(scale)
        torch.sub(block.target[i], error, out=error)
        if i + 1 < len(wanted) and wanted.ndim == 3:
            wanted[i + 1 :].addcmul_(pull[i, i + 1 :], error)
        elif i + 1 < len(wanted):
            wanted[i + 1 :].addr_(pull[i, i + 1 :], error)


def _is_recorded(target: Tensor) -> bool:
    """Whether recording a block is worth it."""
    return target.is_cuda and len(target) >= 4 * _BLOCK


class _Recorded:
    """:func:`_round_block` as a CUDA graph: the same kernels, launched as one. Some eight a column would
    otherwise keep the device waiting for the host.

    Args:
        memory: what the graph works on; blocks are copied to and from it.
    """

    def __init__(self, memory: _Block) -> None:
        self.memory = memory
        here = torch.cuda.current_stream(memory.wanted.device)
        side = torch.cuda.Stream(memory.wanted.device)
        side.wait_stream(here)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.stream(side):
            _round_block(memory)  # whatever kernels load when they are first used cannot be recorded
            # Not torch.cuda.graph, which collects garbage and empties the allocator's cache for each.
            self.graph.capture_begin(capture_error_mode="thread_local")
            _round_block(memory)
            self.graph.capture_end()
        here.wait_stream(side)

    def __call__(self, block: _Block) -> None:
        for mine, given in zip(self.memory.inputs(), block.inputs(), strict=True):
            mine.copy_(given)
        self.graph.replay()
        block.wanted.copy_(self.memory.wanted)
        block.errors.copy_(self.memory.errors)


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
