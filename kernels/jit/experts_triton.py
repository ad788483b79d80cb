"""``y[rows of e] = x[rows of e] @ W[e].T`` on 4-bit weights in planes: all experts in one launch."""

from __future__ import annotations

import triton
import triton.language as tl

from awqc.kernels.jit.gemm_triton import accumulate


@triton.jit(do_not_specialize=["m", "each", "groups"])
def experts_gemm(
    x_ptr,
    ends_ptr,
    words_ptr,
    scales_ptr,
    zeros_ptr,
    y_ptr,
    m,
    each,
    n,
    k,
    rows,
    groups,
    experts: tl.constexpr,
    padded: tl.constexpr,
    group: tl.constexpr,
    run: tl.constexpr,
    width: tl.constexpr,
    block_m: tl.constexpr,
    block_n: tl.constexpr,
    stages: tl.constexpr,
    whole_k: tl.constexpr,
    whole_n: tl.constexpr,
    has_ends: tl.constexpr,
    partial: tl.constexpr,
    ptx: tl.constexpr,
    widen: tl.constexpr,
    dependent: tl.constexpr,
):
    """A ``(block_n, block_m)`` tile of ``y`` transposed, over one of ``num_programs(1)`` shares of K.

    Tiles of tokens are counted expert by expert, so that no tile has tokens of two. Which expert a program
    has follows from ``ends``, on the device. Tokens after the last expert's are an expert more, without
    weights: its sums stay zero.

    Args:
        x_ptr: ``(m, k)`` contiguous, sorted by expert.
        ends_ptr: ``(experts,)`` int32, the first token after those of each expert; read with ``has_ends``.
        words_ptr: ``(experts, blocks, rows, width)`` int16, see :mod:`awqc.kernels.planes`.
        scales_ptr, zeros_ptr: ``(experts, groups, rows)`` floating and uint8.
        y_ptr: ``(m, n)`` in the dtype of ``x``; with ``partial`` ``(shares, m, n)`` float32.
        each: tokens of every expert without ``has_ends``.
        padded: a power of two above ``experts``.
        dependent: launched before its predecessor in the stream has finished (Hopper and later).
    """
    share = tl.program_id(1)
    if dependent:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()

    index = tl.arange(0, padded)
    if has_ends:
        ends = tl.load(ends_ptr + index, mask=index < experts, other=m)
        starts = tl.load(ends_ptr + index - 1, mask=(index > 0) & (index <= experts), other=0)
        starts = tl.where(index > experts, m, starts)
    else:
        ends = tl.minimum((index + 1) * each, m)
        starts = tl.minimum(index * each, m)
    tiles = (tl.maximum(ends - starts, 0) + block_m - 1) // block_m
    before = tl.cumsum(tiles, 0) - tiles
    own = (before <= tl.program_id(2)) & (tl.program_id(2) < before + tiles)
    expert = tl.sum(tl.where(own, index, 0), 0)
    start = tl.sum(tl.where(own, starts + (tl.program_id(2) - before) * block_m, 0), 0)
    end = tl.sum(tl.where(own, ends, 0), 0)
    if end <= start:
        return

    row = tl.program_id(0) * block_n + tl.arange(0, block_n)
    token = tl.arange(0, block_m)
    blocks = tl.cdiv(k, 4 * width)
    first = blocks * share // tl.num_programs(1)
    last = blocks * (share + 1) // tl.num_programs(1)
    last = tl.where(expert < experts, last, first)
    weight = tl.minimum(expert, experts - 1).to(tl.int64) * rows
    total = accumulate(
        x_ptr + start.to(tl.int64) * k,
        words_ptr + weight * blocks * width,
        scales_ptr + weight * groups,
        zeros_ptr + weight * groups,
        row,
        token,
        end - start,
        first,
        last,
        k,
        rows,
        groups,
        group,
        run,
        width,
        block_m,
        block_n,
        stages,
        whole_k,
        ptx,
        widen,
    )

    mask = token[None, :] < end - start
    if not whole_n:
        mask &= row[:, None] < n
    result_ptr = y_ptr + start.to(tl.int64) * n + token[None, :] * n + row[:, None]
    if partial:
        tl.store(result_ptr + share.to(tl.int64) * m * n, total, mask=mask)
    else:
        tl.store(result_ptr, total.to(y_ptr.dtype.element_ty), mask=mask)
