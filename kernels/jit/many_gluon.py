"""``y = x @ W.T`` on 4-bit weights in planes for many tokens on Hopper, and the ordered sum over shares of K.

In Gluon, where waits are one's own: what Triton makes of such a product waits for every ``wgmma`` before the
next weights are dequantized, or overwrites weights that the matrix unit still reads (docs/kernels.md, 32).
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

# Their names until Triton 3.6, and later ones.
_copy = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
_barrier = getattr(gl, "barrier", None) or gl.thread_barrier


def _packed_float16(plane: int) -> str:
    # 1024 + q as its bits, minus 1024 + z, times the scale; where q is in the bits above, 1024 + 16 q, and
    # 64 + q after a product that costs what the difference does. Two shifts less for four codes.
    half = f"shr.u32 code, $1, {8 * (plane // 2)};"
    if plane % 2 == 0:
        code = "lop3.b32 code, code, 0x000f000f, 0x64006400, 0xea; sub.f16x2 code, code, $2;"
    else:
        code = """mov.b32 sixteenth, 0x2c002c00; lop3.b32 code, code, 0x00f000f0, 0x64006400, 0xea;
        fma.rn.f16x2 code, code, sixteenth, $2;"""
    return f"{{ .reg .b32 code, sixteenth; {half} {code} mul.f16x2 $0, code, $3; }}"


def _packed_bfloat16(plane: int) -> str:
    # The same with 128; there is no difference of bfloat16 but by a product with one.
    return f"""{{
        .reg .b32 code, one;
        mov.b32 one, 0x3f803f80;
        shr.u32 code, $1, {4 * plane};
        lop3.b32 code, code, 0x000f000f, 0x43004300, 0xea;
        fma.rn.bf16x2 code, code, one, $2;
        mul.bf16x2 $0, code, $3;
        }}"""


def _wide(plane: int) -> str:
    # 128 + q in float32, times the scale, minus (128 + z) times the scale: exact for scales of 16 bits. The
    # first result is written before the operands of the second are read.
    return f"""{{
        .reg .b32 low, high;
        shl.b32 low, $2, {16 - 4 * plane};
        shr.u32 high, $2, {4 * plane};
        lop3.b32 low, low, 0x000f0000, 0x43000000, 0xea;
        lop3.b32 high, high, 0x000f0000, 0x43000000, 0xea;
        fma.rn.f32 $0, low, $3, $5;
        fma.rn.f32 $1, high, $4, $6;
        }}"""


_PACKED_FLOAT16 = gl.constexpr(tuple(_packed_float16(plane) for plane in range(4)))
_PACKED_BFLOAT16 = gl.constexpr(tuple(_packed_bfloat16(plane) for plane in range(4)))
_WIDE = gl.constexpr(tuple(_wide(plane) for plane in range(4)))


@gluon.jit
def _weights(words, scale, zero, dtype: gl.constexpr, plane: gl.constexpr):
    """``(code - zero) * scale`` of one plane of a tile of words, in ``dtype``, rounded once."""
    if scale.dtype != dtype:
        wide = scale.to(gl.float32)
        factor, _ = gl.broadcast(wide.expand_dims(1), words)
        offset, _ = gl.broadcast((wide * (-128.0 - zero.to(gl.float32))).expand_dims(1), words)
        product = gl.inline_asm_elementwise(
            _WIDE[plane], "=&f,=&f,r,f,f,f,f", [words, factor, offset], gl.float32, is_pure=True, pack=2
        )
        return product.to(dtype)
    factor, _ = gl.broadcast(scale.expand_dims(1), words)
    if dtype == gl.float16:
        if plane % 2 == 0:
            below = (zero.to(gl.int16) | 0x6400).to(gl.float16, bitcast=True)
        else:
            below = (-64.0 - zero.to(gl.float32)).to(gl.float16)
        offset, _ = gl.broadcast(below.expand_dims(1), words)
        return gl.inline_asm_elementwise(
            _PACKED_FLOAT16[plane], "=r,r,r,r", [words, offset, factor], gl.float16, is_pure=True, pack=2
        )
    else:
        below = (zero.to(gl.int16) | 0x4300).to(gl.bfloat16, bitcast=True)
        offset, _ = gl.broadcast((-below).expand_dims(1), words)
        return gl.inline_asm_elementwise(
            _PACKED_BFLOAT16[plane], "=r,r,r,r", [words, offset, factor], gl.bfloat16, is_pure=True, pack=2
        )


@gluon.jit
def _of_groups(
    scales_ptr,
    zeros_ptr,
    row,
    block,
    rows,
    groups,
    group: gl.constexpr,
    run: gl.constexpr,
    width: gl.constexpr,
):
    """Scale and zero point of each run of planes of a block, one after the other."""
    values = ()
    for r in gl.static_range(4 // run):
        g = gl.minimum((4 * block + r * run) * width // group, groups - 1)
        of_run = (gl.load(scales_ptr + g * rows + row), gl.load(zeros_ptr + g * rows + row))
        values = values + of_run
    return values


@gluon.jit
def _fetch(desc, row, column, ring, full, index, wanted, stages: gl.constexpr, pieces: gl.constexpr):
    """Begin to copy ``pieces`` neighbouring tiles to stage ``index`` of a ring, if it is ``wanted``."""
    stage = index % stages
    mbarrier.expect(full.index(stage), pieces * desc.block_type.nbytes, pred=wanted)
    for i in gl.static_range(pieces):
        column_i = column + i * desc.block_type.shape[1]
        _copy(desc, [row, column_i], full.index(stage), ring.index(stage * pieces + i), pred=wanted)


@gluon.jit
def _place(tile, m, n, height, block_m: gl.constexpr, block_n: gl.constexpr):
    """First row and token of a tile: ``height`` tiles of rows with all tokens, then the next, so that
    programs that run at a time share weights as well as tokens."""
    tiles_m = gl.cdiv(m, block_m)
    first = tile // (height * tiles_m) * height
    tall = gl.minimum(gl.cdiv(n, block_n) - first, height)
    within = tile % (height * tiles_m)
    return (first + within % tall) * block_n, within // tall * block_m


@gluon.jit
def _after_predecessor():
    gl.inline_asm_elementwise("griddepcontrol.wait; // $0", "=r", [], gl.int32, is_pure=False, pack=1)
    gl.inline_asm_elementwise(
        "griddepcontrol.launch_dependents; // $0", "=r", [], gl.int32, is_pure=False, pack=1
    )


@gluon.jit(do_not_specialize=["m", "groups", "blocks", "whole", "shares", "height"])
def gemm_many(
    x_desc,
    words_desc,
    scales_ptr,
    zeros_ptr,
    bias_ptr,
    y_ptr,
    partial_ptr,
    m,
    n,
    rows,
    groups,
    blocks,
    whole,
    shares,
    height,
    group: gl.constexpr,
    run: gl.constexpr,
    width: gl.constexpr,
    block_m: gl.constexpr,
    block_n: gl.constexpr,
    stages: gl.constexpr,
    planes: gl.constexpr,
    words_stages: gl.constexpr,
    part: gl.constexpr,
    shared: gl.constexpr,
    has_bias: gl.constexpr,
    num_warps: gl.constexpr,
):
    """A ``(block_n, block_m)`` tile of ``y`` transposed, or a share of K of one.

    Weights go from words in registers to weights in registers to the matrix unit; while it multiplies
    ``part`` channels of a plane, those after them are dequantized. One thread copies ahead.

    Args:
        x_desc: tiles ``(block_m, width)`` of ``(m, K)`` float16 or bfloat16.
        words_desc: tiles ``(block_n, width)`` of words ``(blocks * rows, width)`` int16.
        scales_ptr, zeros_ptr: ``(groups, rows)`` floating and uint8.
        bias_ptr: ``(n,)`` floating, read with ``has_bias``.
        y_ptr: ``(m, n)`` in the dtype of ``x``.
        partial_ptr: with ``shared``, sums of shares ``(tiles - whole, shares, block_m, block_n)`` float32.
        whole: tiles that one program multiplies; of those after them each of ``shares`` programs has a part.
        height: tiles of rows that are multiplied with all tokens before the next ones are.
        group: channels that share a scale.
        run: consecutive planes that share a scale, 1, 2 or 4.
        stages, planes: activations on their way: stages, and planes of each.
        words_stages: blocks of words on their way.
    """
    dtype: gl.constexpr = x_desc.dtype
    program = gl.program_id(0)
    tile, first, last = program, 0, blocks
    if shared and program >= whole:
        tile = whole + (program - whole) // shares
        share = (program - whole) % shares
        first, last = blocks * share // shares, blocks * (share + 1) // shares
    row0, token0 = _place(tile, m, n, height, block_m, block_n)
    count = last - first
    steps = 4 // planes * count

    x_ring = gl.allocate_shared_memory(dtype, [stages * planes, block_m, width], x_desc.layout)
    words_ring = gl.allocate_shared_memory(gl.int16, [words_stages, block_n, width], words_desc.layout)
    x_full = gl.allocate_shared_memory(gl.int64, [stages, 1], mbarrier.MBarrierLayout())
    words_full = gl.allocate_shared_memory(gl.int64, [words_stages, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(stages):
        mbarrier.init(x_full.index(i), count=1)
    for i in gl.static_range(words_stages):
        mbarrier.init(words_full.index(i), count=1)
    fence_async_shared()
    _after_predecessor()
    for i in gl.static_range(words_stages - 1):
        _fetch(
            words_desc, (first + i) * rows + row0, 0, words_ring, words_full, i, i < count, words_stages, 1
        )
    for i in gl.static_range(stages - 1):
        column = (4 * first + i * planes) * width
        _fetch(x_desc, token0, column, x_ring, x_full, i, i < steps, stages, planes)

    sums: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [num_warps, 1], [16, block_m, 16])
    left: gl.constexpr = gl.DotOperandLayout(0, sums, 2)
    row = row0 + gl.arange(0, block_n, gl.SliceLayout(1, left))
    total = gl.zeros([block_n, block_m], gl.float32, sums)
    before = gl.zeros([block_n, part], dtype, left)
    ahead = _of_groups(scales_ptr, zeros_ptr, row, first, rows, groups, group, run, width)
    gl.assume(count > 0)
    for block in range(count):
        of_groups = ahead
        then = gl.minimum(first + block + 1, last - 1)
        ahead = _of_groups(scales_ptr, zeros_ptr, row, then, rows, groups, group, run, width)
        stage = block % words_stages
        mbarrier.wait(words_full.index(stage), block // words_stages & 1)
        words = ()
        for i in gl.static_range(width // part):
            own = (words_ring.index(stage).slice(i * part, part, dim=1).load(left),)
            words = words + own
        for plane in gl.static_range(4):
            step = block * (4 // planes) + plane // planes
            x = x_ring.index(step % stages * planes + plane % planes).permute((1, 0))
            for i in gl.static_range(width // part):
                scale, zero = of_groups[plane // run * 2], of_groups[plane // run * 2 + 1]
                weights = _weights(words[i], scale, zero, dtype, plane)
                if plane % planes == 0 and i == 0:
                    mbarrier.wait(x_full.index(step % stages), step // stages & 1)
                total = warpgroup_mma(weights, x.slice(i * part, part, dim=0), total, is_async=True)
                # Weights of the product before, in registers, may be overwritten once it has ended, and with
                # it all products of the stage before.
                total, before = warpgroup_mma_wait(1, deps=[total, before])
                before = weights
                if plane % planes == 0 and i == 0:
                    _barrier()
                    then = step + stages - 1
                    column = (4 * first + then * planes) * width
                    _fetch(x_desc, token0, column, x_ring, x_full, then, then < steps, stages, planes)
                    if plane == 0:
                        then = block + words_stages - 1
                        row_w = (first + then) * rows + row0
                        _fetch(
                            words_desc, row_w, 0, words_ring, words_full, then, then < count, words_stages, 1
                        )
    total, before = warpgroup_mma_wait(0, deps=[total, before])
    _barrier()
    if shared and program >= whole:
        own_ptr = partial_ptr + (program - whole).to(gl.int64) * (block_m * block_n)
        _store(total, own_ptr, block_n, block_m, block_n, block_m, block_n, num_warps)
    else:
        if has_bias:
            of_sums = row0 + gl.arange(0, block_n, gl.SliceLayout(1, sums))
            bias = gl.load(bias_ptr + of_sums, mask=of_sums < n, other=0.0).to(gl.float32)
            total += bias.expand_dims(1)
        tile_ptr = y_ptr + token0.to(gl.int64) * n + row0
        out = total.to(y_ptr.dtype.element_ty)
        _store(out, tile_ptr, n, m - token0, n - row0, block_m, block_n, num_warps)


@gluon.jit
def _store(
    tile,
    target_ptr,
    stride,
    tokens,
    rows,
    block_m: gl.constexpr,
    block_n: gl.constexpr,
    num_warps: gl.constexpr,
):
    """The transpose of ``tile`` to ``(tokens, rows)`` at ``target_ptr``, in runs of 16 bytes."""
    each: gl.constexpr = 128 // tile.dtype.primitive_bitwidth
    lanes: gl.constexpr = min(32, block_n // each)
    runs: gl.constexpr = gl.BlockedLayout([1, each], [32 // lanes, lanes], [num_warps, 1], [1, 0])
    layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([block_m, block_n], tile.dtype)
    staged = gl.allocate_shared_memory(tile.dtype, [block_m, block_n], layout)
    staged.permute((1, 0)).store(tile)
    _barrier()
    token = gl.arange(0, block_m, gl.SliceLayout(1, runs)).expand_dims(1)
    row = gl.arange(0, block_n, gl.SliceLayout(0, runs)).expand_dims(0)
    gl.store(target_ptr + token * stride + row, staged.load(runs), mask=(token < tokens) & (row < rows))


@gluon.jit(do_not_specialize=["m", "whole", "height"])
def add_tiles(
    partial_ptr,
    bias_ptr,
    y_ptr,
    m,
    n,
    whole,
    height,
    shares: gl.constexpr,
    block_m: gl.constexpr,
    block_n: gl.constexpr,
    block: gl.constexpr,
    has_bias: gl.constexpr,
    num_warps: gl.constexpr,
):
    """Add the shares of ``block`` tokens of a tile, first to last, and the bias; arguments as above."""
    layout: gl.constexpr = gl.BlockedLayout([1, 4], [1, 32], [num_warps, 1], [1, 0])
    tile = gl.program_id(0)
    row0, token0 = _place(whole + tile, m, n, height, block_m, block_n)
    token = gl.program_id(1) * block + gl.arange(0, block, gl.SliceLayout(1, layout)).expand_dims(1)
    column = gl.arange(0, block_n, gl.SliceLayout(0, layout))
    row = row0 + column
    mask = (token0 + token < m) & (row.expand_dims(0) < n)
    source = (
        partial_ptr
        + tile.to(gl.int64) * shares * (block_m * block_n)
        + token * block_n
        + column.expand_dims(0)
    )
    _after_predecessor()
    total = gl.zeros([block, block_n], gl.float32, layout)
    for share in gl.static_range(shares):
        total += gl.load(source + share * (block_m * block_n), mask=mask, other=0.0)
    if has_bias:
        total += gl.load(bias_ptr + row, mask=row < n, other=0.0).to(gl.float32).expand_dims(0)
    target = y_ptr + (token0 + token).to(gl.int64) * n + row.expand_dims(0)
    gl.store(target, total.to(y_ptr.dtype.element_ty), mask=mask)
