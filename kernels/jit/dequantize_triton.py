"""The dense weight of 4-bit codes in planes."""

from __future__ import annotations

import triton
import triton.language as tl

from awqc.kernels.jit.words_triton import differences


@triton.jit(do_not_specialize=["groups"])
def dequantize(
    words_ptr,
    scales_ptr,
    zeros_ptr,
    weight_ptr,
    n,
    k,
    rows,
    groups,
    group: tl.constexpr,
    run: tl.constexpr,
    width: tl.constexpr,
    block_n: tl.constexpr,
    whole_k: tl.constexpr,
    ptx: tl.constexpr,
):
    """One block of channels of ``block_n`` rows of ``weight_ptr`` ``(n, k)``; operands as for ``gemm``.

    The product is taken in float32 and rounded once, to the dtype of the weight. All four planes are stored
    as one tile: a store a plane writes short pieces of rows, and the compiler moves no load over it, so that
    the scales of one run waited for the stores of the run before.
    """
    channels: tl.constexpr = 4 * width
    dtype: tl.constexpr = weight_ptr.dtype.element_ty
    block = tl.program_id(0)
    row = tl.program_id(1) * block_n + tl.arange(0, block_n)
    channel = tl.arange(0, width)
    # Words are read once; what is written is read next, and had better stay in the cache.
    tile_ptr = words_ptr + (block.to(tl.int64) * rows + row[:, None]) * width + channel[None, :]
    words = tl.load(tile_ptr, eviction_policy="evict_first")
    weights = ()
    for r in tl.static_range(4 // run):
        start = block * channels + r * run * width
        g = start // group if whole_k else tl.minimum(start // group, groups - 1)
        scales = tl.load(scales_ptr + g * rows + row).to(tl.float32)
        zeros = tl.load(zeros_ptr + g * rows + row)
        planes = differences(words, zeros[:, None], dtype, ptx)
        for j in tl.static_range(run):
            weights += ((planes[r * run + j].to(tl.float32) * scales[:, None]).to(dtype),)
    # Joined twice, plane 2 i + j is at (..., i, j).
    pairs = tl.join(tl.join(weights[0], weights[2]), tl.join(weights[1], weights[3]))
    tile = tl.reshape(tl.permute(pairs, (0, 2, 3, 1)), (block_n, channels))
    column = block * channels + tl.arange(0, channels)[None, :]
    mask = row[:, None] < n
    if not whole_k:
        mask &= column < k
    tl.store(weight_ptr + row[:, None].to(tl.int64) * k + column, tile, mask=mask)
