"""``y = x @ W.T`` on 4-bit weights in planes, on the matrix units, and the ordered sum over splits of K."""

from __future__ import annotations

import triton
import triton.language as tl

from awqc.kernels.jit.words_triton import differences


@triton.jit
def accumulate(
    x_ptr,
    words_ptr,
    scales_ptr,
    zeros_ptr,
    row,
    token,
    tokens,
    first,
    last,
    k,
    rows,
    groups,
    group: tl.constexpr,
    run: tl.constexpr,
    width: tl.constexpr,
    block_m: tl.constexpr,
    block_n: tl.constexpr,
    stages: tl.constexpr,
    whole_k: tl.constexpr,
    ptx: tl.constexpr,
    widen: tl.constexpr,
):
    """``(block_n, block_m)`` float32: products of rows ``row`` of the weight and tokens ``token`` of ``x``,
    those below ``tokens``, over the blocks of K from ``first`` to ``last``.

    The weight is the left operand: dequantized in registers, in the layout in which it was loaded, it goes to
    the matrix unit without a detour over shared memory, and the right operand may be as narrow as 8 tokens.
    Within a run of planes that share a scale, differences of codes are multiplied, which are exact in 16
    bits; the scale multiplies the float32 sum.
    """
    channels: tl.constexpr = 4 * width
    dtype: tl.constexpr = tl.float32 if widen else x_ptr.dtype.element_ty
    channel = tl.arange(0, width)
    tile_ptr = words_ptr + (first.to(tl.int64) * rows + row[:, None]) * width + channel[None, :]
    input_ptr = x_ptr + token[None, :] * k + channel[:, None]
    total = tl.zeros((block_n, block_m), tl.float32)
    for block in tl.range(first, last, num_stages=stages):
        words = tl.load(tile_ptr)
        tile_ptr += rows * width
        for r in tl.static_range(4 // run):
            start = block * channels + r * run * width
            g = start // group if whole_k else tl.minimum(start // group, groups - 1)
            scales = tl.load(scales_ptr + g * rows + row).to(tl.float32)
            zeros = tl.load(zeros_ptr + g * rows + row)
            planes = differences(words, zeros[:, None], dtype, ptx)
            product = tl.zeros((block_n, block_m), tl.float32)
            for j in tl.static_range(run):
                mask = token[None, :] < tokens
                if not whole_k:
                    mask &= start + j * width + channel[:, None] < k
                x = tl.load(input_ptr + start + j * width, mask=mask, other=0.0).to(dtype)
                product = tl.dot(planes[r * run + j], x, product)
            total += product * scales[:, None]
    return total


@triton.jit(do_not_specialize=["m", "groups"])
def gemm(
    x_ptr,
    words_ptr,
    scales_ptr,
    zeros_ptr,
    bias_ptr,
    y_ptr,
    m,
    n,
    k,
    rows,
    groups,
    group: tl.constexpr,
    run: tl.constexpr,
    width: tl.constexpr,
    block_m: tl.constexpr,
    block_n: tl.constexpr,
    stages: tl.constexpr,
    whole_k: tl.constexpr,
    whole_n: tl.constexpr,
    partial: tl.constexpr,
    has_bias: tl.constexpr,
    ptx: tl.constexpr,
    widen: tl.constexpr,
    dependent: tl.constexpr,
):
    """A ``(block_n, block_m)`` tile of ``y`` transposed, over one of ``num_programs(1)`` shares of K.

    Args:
        x_ptr: ``(m, k)`` contiguous float16 or bfloat16.
        words_ptr: ``(blocks, rows, width)`` int16, see :mod:`awqc.kernels.planes`.
        scales_ptr, zeros_ptr: ``(groups, rows)`` floating and uint8.
        bias_ptr: ``(n,)`` floating, read with ``has_bias``.
        y_ptr: ``(m, n)`` in the dtype of ``x``; with ``partial`` ``(shares, m, n)`` float32.
        group: channels that share a scale.
        run: consecutive planes that share a scale, 1, 2 or 4.
        whole_k, whole_n: whether blocks and tiles divide ``k`` and ``n``.
        ptx: see :func:`differences`.
        widen: multiply in float32, for the interpreter, which has no product of bfloat16.
        dependent: launched before its predecessor in the stream has finished (Hopper and later).
    """
    row = tl.program_id(0) * block_n + tl.arange(0, block_n)
    share = tl.program_id(1)
    token = tl.program_id(2) * block_m + tl.arange(0, block_m)
    blocks = tl.cdiv(k, 4 * width)
    first = blocks * share // tl.num_programs(1)
    last = blocks * (share + 1) // tl.num_programs(1)
    if dependent:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()

    total = accumulate(
        x_ptr,
        words_ptr,
        scales_ptr,
        zeros_ptr,
        row,
        token,
        m,
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
    mask = token[None, :] < m
    if not whole_n:
        mask &= row[:, None] < n
    result_ptr = y_ptr + token[None, :] * n + row[:, None]
    if partial:
        tl.store(result_ptr + share.to(tl.int64) * m * n, total, mask=mask)
    else:
        if has_bias:
            total += tl.load(bias_ptr + row, mask=row < n, other=0.0).to(tl.float32)[:, None]
        tl.store(result_ptr, total.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["shares"])
def add_shares(
    partial_ptr,
    bias_ptr,
    y_ptr,
    size,
    n,
    shares,
    block: tl.constexpr,
    has_bias: tl.constexpr,
    dependent: tl.constexpr,
):
    """Sums ``(shares, size)`` float32 over the shares, first to last, and adds the bias of each column."""
    index = tl.program_id(0) * block + tl.arange(0, block)
    mask = index < size
    if dependent:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    total = tl.zeros((block,), tl.float32)
    pointers = partial_ptr + index
    for _ in range(shares):
        total += tl.load(pointers, mask=mask, other=0.0)
        pointers += size
    if has_bias:
        total += tl.load(bias_ptr + index % n, mask=mask, other=0.0).to(tl.float32)
    tl.store(y_ptr + index, total.to(y_ptr.dtype.element_ty), mask=mask)
