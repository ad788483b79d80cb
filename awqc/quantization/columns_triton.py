"""A block of columns rounded one after the other, in registers."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def nearest(x):
    """``x`` rounded half to even: what is added leaves no bits below 1. Beyond ``2 ** 22``, far from any
    code, the result is near."""
    return (x + 12582912.0) - 12582912.0


@triton.jit(do_not_specialize=["start", "count"])
def round_columns(
    target_ptr,
    wanted_ptr,
    scales_ptr,
    zeros_ptr,
    rows_ptr,
    factor_ptr,
    codes_ptr,
    start,
    count,
    n,
    factor_expert,
    factor_row,
    factor_column,
    top: tl.constexpr,
    at_once: tl.constexpr,
    unrolled: tl.constexpr,
    block_n: tl.constexpr,
):
    """Columns ``start`` to ``start + count`` of ``block_n`` rows of the weight of one expert, as
    ``round_block`` of :mod:`awqc.quantization.columns` does it: each sum in the same order.

    ``at_once`` columns are in registers. Before they are rounded, one by one, they take what the columns of
    the block before them left: no program needs another's rows, so a block is one launch.

    Args:
        target_ptr: ``(count, experts, n)`` float32, these columns of the weight.
        wanted_ptr, codes_ptr: ``(k, experts, n)`` float32 and uint8.
        scales_ptr, zeros_ptr: ``(rows, experts, n)`` float32.
        rows_ptr: ``(k, experts)`` int64, the row of each column.
        factor_ptr: float32 with the strides ``factor_expert``, ``factor_row``, ``factor_column``.
        unrolled: divides ``at_once``.
    """
    expert = tl.program_id(1).to(tl.int64)
    experts = tl.num_programs(1)
    row = tl.program_id(0) * block_n + tl.arange(0, block_n)
    mask = row < n
    run = experts.to(tl.int64) * n
    at = expert * n + row
    first = tl.full((), start, tl.int64)
    target_ptr += at
    rows_ptr += first * experts + expert
    wanted_ptr += first * run + at
    codes_ptr += first * run + at
    scales_ptr += at
    zeros_ptr += at
    factor_ptr += expert * factor_expert + first * (factor_row + factor_column)
    next_row = tl.full((), factor_row, tl.int64)
    index = tl.arange(0, at_once)
    for begin in range(0, count, at_once):
        column = begin + index
        inside = column < count
        tile = inside[:, None] & mask[None, :]
        tile_ptr = wanted_ptr[None, :] + column.to(tl.int64)[:, None] * run
        wanted = tl.load(tile_ptr, mask=tile, other=0.0)
        pulls_ptr = factor_ptr + column.to(tl.int64) * factor_column
        for before in range(0, begin, unrolled):
            for j in tl.static_range(unrolled):
                i = before + j
                error = tl.load(wanted_ptr + i * run, mask=mask, other=0.0)
                pull = tl.load(pulls_ptr + i * next_row, mask=inside, other=0.0)
                wanted = add_product(wanted, pull, error)
        # What a column needs is asked for a column ahead.
        grid = tl.load(rows_ptr + begin * experts) * run
        target = tl.load(target_ptr + begin * run, mask=mask, other=0.0)
        scale = tl.load(scales_ptr + grid, mask=mask, other=1.0)
        zero = tl.load(zeros_ptr + grid, mask=mask, other=0.0)
        for i in range(0, tl.minimum(at_once, count - begin)):
            here = begin + i
            ahead = tl.minimum(here + 1, count - 1)
            grid = tl.load(rows_ptr + ahead * experts) * run
            next_target = tl.load(target_ptr + ahead * run, mask=mask, other=0.0)
            next_scale = tl.load(scales_ptr + grid, mask=mask, other=1.0)
            next_zero = tl.load(zeros_ptr + grid, mask=mask, other=0.0)
            pull = tl.load(pulls_ptr + here * next_row, mask=inside & (index > i), other=0.0)
            own = index[:, None] == i
            value = tl.sum(tl.where(own, wanted, 0.0), 0)
            code = nearest(tl.div_rn(value, scale)) + zero
            code = tl.minimum(tl.maximum(code, 0.0), top)
            tl.store(codes_ptr + here * run, code.to(tl.uint8), mask=mask)
            error = target - (code - zero) * scale
            wanted = tl.where(own, error[None, :], add_product(wanted, pull, error))
            target, scale, zero = next_target, next_scale, next_zero
        tl.store(tile_ptr, wanted, mask=tile)
        tl.debug_barrier()  # the next columns read these


@triton.jit
def add_product(total, column, row):
    """``total + column row^T``, rounded once."""
    column, _ = tl.broadcast(column[:, None], total)
    row, _ = tl.broadcast(row[None, :], total)
    return tl.fma(column, row, total)
