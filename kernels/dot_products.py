"""The LLVM code behind ``awqc::qlinear_llvm``: dot products of 4-bit codes with 16-bit activations.

Everything is integer until the sum over a chunk of input channels is done. An activation is rounded to 16
bits at a step of its own for each chunk and row and split in two signed bytes, ``x = (256 h + l) * step``.
The instructions that multiply unsigned by signed bytes, four to a 32-bit sum, then take codes as they are:

    y[n] = sum over chunks of  scale[n] * step * (256 sum(q h) + sum(q l) - zero[n] * sum(x / step))

A block of 16 output rows fills a vector. A step of the loop over channels reads the codes of 8 channels, 16
times 4 bytes: byte ``i`` of a row holds channel ``i`` in its low and ``4 + i`` in its high half. So codes are
read in the order in which they lie in memory, once for a few rows of activations, and take three
instructions to unpack for 128 of them.

The entry point gets one array of 64-bit values, in the order of ``ARGUMENTS``.
"""

from __future__ import annotations

from collections.abc import Sequence

#: What the entry point finds in its array: addresses, sizes, and the functions that start threads.
ARGUMENTS = (
    "x",  # (rows, channels) activations
    "codes",  # (blocks, channels / 8, 16, 4) bytes
    "scales",  # (blocks, chunks, 16)
    "zeros",  # (blocks, chunks, 16) bytes
    "out",  # (rows, blocks * 16) float32
    "digits",  # scratch: (rows, 2, channels) bytes, high ones first
    "sums",  # scratch: (rows, chunks) float32, of the rounded activations in steps
    "steps",  # scratch: (rows, chunks) float32
    "rows",
    "blocks",
    "chunks",
    "octets",  # eights of channels in a chunk, an even number
    "threads",
    "parallel",  # GOMP_parallel
    "thread",  # omp_get_thread_num
    "team",  # omp_get_num_threads
)
#: LLVM's names for the dtypes of activations and scales.
TYPES = {"float32": "float", "float16": "half", "bfloat16": "bfloat"}
#: Rows of activations that share one reading of the codes, by instruction set: two sums are held for each.
TILE = {"avx512vnni": 4, "avxvnni": 2, "avx2": 2}
#: Bytes by which the reading of codes runs ahead.
_AHEAD = 2048
#: The largest activation of a chunk becomes 127 * 256, so that its high byte is at most 127.
_TOP = 127 * 256

#: Multiply 64 unsigned by 64 signed bytes and add each four products to one of 16 sums.
_DOT = {
    "avx512vnni": """
declare <16 x i32> @llvm.x86.avx512.vpdpbusd.512(<16 x i32>, <16 x i32>, <16 x i32>)
define internal <16 x i32> @dot(<16 x i32> %sum, <16 x i32> %q, <16 x i32> %x) alwaysinline {
  %r = call <16 x i32> @llvm.x86.avx512.vpdpbusd.512(<16 x i32> %sum, <16 x i32> %q, <16 x i32> %x)
  ret <16 x i32> %r
}""",
    "avxvnni": """
declare <8 x i32> @llvm.x86.avx512.vpdpbusd.256(<8 x i32>, <8 x i32>, <8 x i32>)
define internal <8 x i32> @half(<8 x i32> %sum, <8 x i32> %q, <8 x i32> %x) alwaysinline {
  %r = call <8 x i32> @llvm.x86.avx512.vpdpbusd.256(<8 x i32> %sum, <8 x i32> %q, <8 x i32> %x)
  ret <8 x i32> %r
}""",
    # The products of two codes and bytes stay below 2 * 15 * 128, far from saturation at 16 bits.
    "avx2": """
declare <16 x i16> @llvm.x86.avx2.pmadd.ub.sw(<32 x i8>, <32 x i8>)
declare <8 x i32> @llvm.x86.avx2.pmadd.wd(<16 x i16>, <16 x i16>)
define internal <8 x i32> @half(<8 x i32> %sum, <8 x i32> %q, <8 x i32> %x) alwaysinline {
  %q8 = bitcast <8 x i32> %q to <32 x i8>
  %x8 = bitcast <8 x i32> %x to <32 x i8>
  %p = call <16 x i16> @llvm.x86.avx2.pmadd.ub.sw(<32 x i8> %q8, <32 x i8> %x8)
  %d = call <8 x i32> @llvm.x86.avx2.pmadd.wd(<16 x i16> %p, <16 x i16> splat (i16 1))
  %r = add <8 x i32> %sum, %d
  ret <8 x i32> %r
}""",
}

#: Where vectors have 256 bits, a dot product is one of each half.
_HALVES = """
define internal <16 x i32> @dot(<16 x i32> %sum, <16 x i32> %q, <16 x i32> %x) alwaysinline {
  %s0 = shufflevector <16 x i32> %sum, <16 x i32> poison, <8 x i32> LOW
  %s1 = shufflevector <16 x i32> %sum, <16 x i32> poison, <8 x i32> HIGH
  %q0 = shufflevector <16 x i32> %q, <16 x i32> poison, <8 x i32> LOW
  %q1 = shufflevector <16 x i32> %q, <16 x i32> poison, <8 x i32> HIGH
  %x0 = shufflevector <16 x i32> %x, <16 x i32> poison, <8 x i32> LOW
  %r0 = call <8 x i32> @half(<8 x i32> %s0, <8 x i32> %q0, <8 x i32> %x0)
  %r1 = call <8 x i32> @half(<8 x i32> %s1, <8 x i32> %q1, <8 x i32> %x0)
  %r = shufflevector <8 x i32> %r0, <8 x i32> %r1, <16 x i32> BOTH
  ret <16 x i32> %r
}"""

_COMMON = """
declare void @llvm.prefetch.p0(ptr, i32, i32, i32)
declare <16 x float> @llvm.fma.v16f32(<16 x float>, <16 x float>, <16 x float>)
declare <16 x i32> @llvm.umax.v16i32(<16 x i32>, <16 x i32>)
declare i32 @llvm.vector.reduce.umax.v16i32(<16 x i32>)
declare i32 @llvm.vector.reduce.add.v16i32(<16 x i32>)

define internal <16 x i32> @four_bytes(ptr %at) alwaysinline {
  %one = load i32, ptr %at, align 4
  %first = insertelement <16 x i32> poison, i32 %one, i64 0
  %all = shufflevector <16 x i32> %first, <16 x i32> poison, <16 x i32> zeroinitializer
  ret <16 x i32> %all
}
define internal <16 x float> @spread(ptr %base, i64 %index) alwaysinline {
  %at = getelementptr float, ptr %base, i64 %index
  %one = load float, ptr %at, align 4
  %first = insertelement <16 x float> poison, float %one, i64 0
  %all = shufflevector <16 x float> %first, <16 x float> poison, <16 x i32> zeroinitializer
  ret <16 x float> %all
}
define internal <16 x float> @activations(ptr %at) alwaysinline {
  %given = load <16 x X_TYPE>, ptr %at, align X_BYTES
  %v = EXTEND_X
  ret <16 x float> %v
}
define internal <16 x float> @scales_at(ptr %base, i64 %index) alwaysinline {
  %at = getelementptr <16 x S_TYPE>, ptr %base, i64 %index
  %given = load <16 x S_TYPE>, ptr %at, align S_BYTES
  %v = EXTEND_S
  ret <16 x float> %v
}
"""

# The largest magnitude is found on the bits, where infinity and then NaN come after all numbers: the step is
# then not finite either, and so is what is multiplied with it. Adding 1.5 * 2**23 rounds to an integer and
# leaves it in the low bits. Below 2**-100 a chunk is zero: its inverse step would overflow.
_PREPARE = """
define internal void @prepare(ptr %a) {
entry:
ARGS
  %chunk = shl i64 %octets, 3
  %channels = mul i64 %chunks, %chunk
  %all = mul i64 %rows, %chunks
  br label %next
next:
  %c = phi i64 [0, %entry], [%c1, %done]
  %row = udiv i64 %c, %chunks
  %column = urem i64 %c, %chunks
  %from = mul i64 %c, %chunk
  %row2 = shl i64 %row, 1
  %skip = mul i64 %row2, %channels
  %in = mul i64 %column, %chunk
  %to = add i64 %skip, %in
  %high = getelementptr i8, ptr %digits, i64 %to
  %low = getelementptr i8, ptr %high, i64 %channels
  br label %measure
measure:
  %i = phi i64 [0, %next], [%i1, %measure]
  %top = phi <16 x i32> [zeroinitializer, %next], [%top1, %measure]
  %e = add i64 %from, %i
  %p = getelementptr X_TYPE, ptr %x, i64 %e
  %v = call <16 x float> @activations(ptr %p)
  %bits = bitcast <16 x float> %v to <16 x i32>
  %size = and <16 x i32> %bits, splat (i32 2147483647)
  %top1 = call <16 x i32> @llvm.umax.v16i32(<16 x i32> %top, <16 x i32> %size)
  %i1 = add i64 %i, 16
  %more = icmp ult i64 %i1, %chunk
  br i1 %more, label %measure, label %choose
choose:
  %most = call i32 @llvm.vector.reduce.umax.v16i32(<16 x i32> %top1)
  %largest = bitcast i32 %most to float
  %small = fcmp olt float %largest, TINY
  %step = fdiv float %largest, TOP
  %inverse = fdiv float TOP, %largest
  %step0 = select i1 %small, float 0.0, float %step
  %inverse0 = select i1 %small, float 0.0, float %inverse
  %first = insertelement <16 x float> poison, float %inverse0, i64 0
  %by = shufflevector <16 x float> %first, <16 x float> poison, <16 x i32> zeroinitializer
  %ps = getelementptr float, ptr %steps, i64 %c
  store float %step0, ptr %ps, align 4
  br label %split
split:
  %j = phi i64 [0, %choose], [%j1, %split]
  %sum = phi <16 x i32> [zeroinitializer, %choose], [%sum1, %split]
  %f = add i64 %from, %j
  %q = getelementptr X_TYPE, ptr %x, i64 %f
  %w = call <16 x float> @activations(ptr %q)
  %scaled = fmul <16 x float> %w, %by
  %rounded = fadd <16 x float> %scaled, splat (float MAGIC)
  %pattern = bitcast <16 x float> %rounded to <16 x i32>
  %n = sub <16 x i32> %pattern, splat (i32 MAGIC_BITS)
  %sum1 = add <16 x i32> %sum, %n
  %n128 = add <16 x i32> %n, splat (i32 128)
  %h = ashr <16 x i32> %n128, splat (i32 8)
  %h256 = shl <16 x i32> %h, splat (i32 8)
  %l = sub <16 x i32> %n, %h256
  %h8 = trunc <16 x i32> %h to <16 x i8>
  %l8 = trunc <16 x i32> %l to <16 x i8>
  %ph = getelementptr i8, ptr %high, i64 %j
  %pl = getelementptr i8, ptr %low, i64 %j
  store <16 x i8> %h8, ptr %ph, align 16
  store <16 x i8> %l8, ptr %pl, align 16
  %j1 = add i64 %j, 16
  %again = icmp ult i64 %j1, %chunk
  br i1 %again, label %split, label %done
done:
  %total = call i32 @llvm.vector.reduce.add.v16i32(<16 x i32> %sum1)
  %totalf = sitofp i32 %total to float
  %pt = getelementptr float, ptr %sums, i64 %c
  store float %totalf, ptr %pt, align 4
  %c1 = add i64 %c, 1
  %left = icmp ult i64 %c1, %all
  br i1 %left, label %next, label %end
end:
  ret void
}"""

# Threads take blocks, each the whole of its share; within a block, tiles of rows one after the other.
_TEAM = """
define internal void @team(ptr %a) {
entry:
ARGS
  %t32 = call i32 %thread()
  %n32 = call i32 %team()
  %t = zext i32 %t32 to i64
  %n = zext i32 %n32 to i64
  %t1 = add i64 %t, 1
  %f0 = mul i64 %blocks, %t
  %f1 = mul i64 %blocks, %t1
  %b0 = udiv i64 %f0, %n
  %b1 = udiv i64 %f1, %n
  %any = icmp ult i64 %b0, %b1
  br i1 %any, label %block, label %end
block:
  %b = phi i64 [%b0, %entry], [%bn, %blockend]
  br label %ask
ask:
  %row = phi i64 [0, %block], [%rowt, %whole]
  %rowt = add i64 %row, TILE
  %fits = icmp ule i64 %rowt, %rows
  br i1 %fits, label %whole, label %rest
whole:
  call void @tile_TILE(ptr %a, i64 %b, i64 %row)
  br label %ask
rest:
  %left = sub i64 %rows, %row
  switch i64 %left, label %blockend [ CASES ]
REST
blockend:
  %bn = add i64 %b, 1
  %more = icmp ult i64 %bn, %b1
  br i1 %more, label %block, label %end
end:
  ret void
}
define void @linear(ptr %a) {
entry:
ARGS
  call void @prepare(ptr %a)
  %count = trunc i64 %threads to i32
  %alone = icmp eq i32 %count, 1
  br i1 %alone, label %one, label %many
one:
  call void @team(ptr %a)
  ret void
many:
  call void %parallel(ptr @team, ptr %a, i32 %count, i32 0)
  ret void
}"""


def source(isa: str, x_type: str, scale_type: str) -> str:
    """The module whose ``linear`` runs the whole product.

    Args:
        isa: a key of ``TILE``.
        x_type, scale_type: keys of ``TYPES``.
    """
    tile = TILE[isa]
    code = [_DOT[isa]]
    if isa != "avx512vnni":
        code.append(_HALVES)
    code += [_COMMON, _PREPARE, *(_tile(rows) for rows in range(1, tile + 1)), _TEAM]
    cases = " ".join(f"i64 {rows}, label %rest{rows}" for rows in range(1, tile))
    rest = "\n".join(
        f"rest{rows}:\n  call void @tile_{rows}(ptr %a, i64 %b, i64 %row)\n  br label %blockend"
        for rows in range(1, tile)
    )
    text = "\n".join(code)
    for name, value in {
        "CASES": cases,
        "REST": rest,
        "ARGS": _arguments(),
        "EXTEND_X": _extend(TYPES[x_type]),
        "EXTEND_S": _extend(TYPES[scale_type]),
        "X_TYPE": TYPES[x_type],
        "S_TYPE": TYPES[scale_type],
        "X_BYTES": "4" if x_type == "float32" else "2",
        "S_BYTES": "4" if scale_type == "float32" else "2",
        "LOW": _indices(range(8)),
        "HIGH": _indices(range(8, 16)),
        "BOTH": _indices(range(16)),
        "MAGIC_BITS": str(0x4B400000),
        "MAGIC": "12582912.0",
        "TINY": "0x39B0000000000000",
        "TOP": f"{_TOP}.0",
        "TILE": str(tile),
    }.items():
        text = text.replace(name, value)
    return text


def _indices(values: Sequence[int]) -> str:
    return "<" + ", ".join(f"i32 {value}" for value in values) + ">"


def _extend(kind: str) -> str:
    to = "to <16 x float>"
    return f"bitcast <16 x float> %given {to}" if kind == "float" else f"fpext <16 x {kind}> %given {to}"


def _arguments() -> str:
    """Loads of everything in the array ``%a``; LLVM drops those that are not used."""
    lines = []
    for index, name in enumerate(ARGUMENTS):
        kind = "i64" if name in _SIZES else "ptr"
        lines.append(f"  %p_{name} = getelementptr i64, ptr %a, i64 {index}")
        lines.append(f"  %{name} = load {kind}, ptr %p_{name}, align 8")
    return "\n".join(lines)


_SIZES = ("rows", "blocks", "chunks", "octets", "threads")


def _tile(rows: int) -> str:
    """``tile_ROWS(a, block, row)``: 16 output rows for ``rows`` rows of activations from ``row`` on."""
    tile = range(rows)
    sums = [(m, digit) for m in tile for digit in ("h", "l")]
    lines = [f"define internal void @tile_{rows}(ptr %a, i64 %block, i64 %row) {{", "entry:", "ARGS"]
    lines += [
        "  %all_octets = mul i64 %chunks, %octets",
        "  %channels = shl i64 %all_octets, 3",
        "  %w_skip = mul i64 %block, %all_octets",
        "  %w_block = getelementptr <16 x i32>, ptr %codes, i64 %w_skip",
        "  %s_block = mul i64 %block, %chunks",
        "  %outs = shl i64 %blocks, 4",
        "  %n = shl i64 %block, 4",
    ]
    for m in tile:
        lines += [
            f"  %row_{m} = add i64 %row, {m}",
            f"  %row2_{m} = shl i64 %row_{m}, 1",
            f"  %h_skip_{m} = mul i64 %row2_{m}, %channels",
            f"  %x_h_{m} = getelementptr i8, ptr %digits, i64 %h_skip_{m}",
            f"  %x_l_{m} = getelementptr i8, ptr %x_h_{m}, i64 %channels",
            f"  %c_row_{m} = mul i64 %row_{m}, %chunks",
        ]
    lines += ["  br label %chunk", "chunk:", "  %c = phi i64 [0, %entry], [%c1, %chunkend]"]
    lines += [f"  %y_{m} = phi <16 x float> [zeroinitializer, %entry], [%y1_{m}, %chunkend]" for m in tile]
    lines += ["  %o0 = mul i64 %c, %octets", "  br label %step", "step:"]
    lines += ["  %s = phi i64 [0, %chunk], [%s1, %step]"]
    lines += [
        f"  %{d}_{m} = phi <16 x i32> [zeroinitializer, %chunk], [%{d}4_{m}, %step]" for m, d in sums
    ]
    lines += ["  %o = add i64 %o0, %s"]
    for octet in (0, 1):
        lines += _octet(octet, sums)
    lines += [
        "  %s1 = add i64 %s, 2",
        "  %more = icmp ult i64 %s1, %octets",
        "  br i1 %more, label %step, label %chunkend",
        "chunkend:",
        "  %si = add i64 %s_block, %c",
        "  %scale = call <16 x float> @scales_at(ptr %scales, i64 %si)",
        "  %z_at = getelementptr <16 x i8>, ptr %zeros, i64 %si",
        "  %z8 = load <16 x i8>, ptr %z_at, align 16",
        "  %z = uitofp <16 x i8> %z8 to <16 x float>",
        "  %minus_z = fneg <16 x float> %z",
    ]
    fma = "call <16 x float> @llvm.fma.v16f32"
    for m in tile:
        lines += [
            f"  %ci_{m} = add i64 %c_row_{m}, %c",
            f"  %hf_{m} = sitofp <16 x i32> %h4_{m} to <16 x float>",
            f"  %lf_{m} = sitofp <16 x i32> %l4_{m} to <16 x float>",
            f"  %q_{m} = {fma}(<16 x float> %hf_{m}, <16 x float> splat (float 256.0), <16 x float> %lf_{m})",
            f"  %sum_{m} = call <16 x float> @spread(ptr %sums, i64 %ci_{m})",
            f"  %step_{m} = call <16 x float> @spread(ptr %steps, i64 %ci_{m})",
            f"  %d_{m} = {fma}(<16 x float> %minus_z, <16 x float> %sum_{m}, <16 x float> %q_{m})",
            f"  %by_{m} = fmul <16 x float> %scale, %step_{m}",
            f"  %y1_{m} = {fma}(<16 x float> %by_{m}, <16 x float> %d_{m}, <16 x float> %y_{m})",
        ]
    lines += [
        "  %c1 = add i64 %c, 1",
        "  %go = icmp ult i64 %c1, %chunks",
        "  br i1 %go, label %chunk, label %end",
        "end:",
    ]
    for m in tile:
        lines += [
            f"  %out_skip_{m} = mul i64 %row_{m}, %outs",
            f"  %out_i_{m} = add i64 %out_skip_{m}, %n",
            f"  %out_{m} = getelementptr float, ptr %out, i64 %out_i_{m}",
            f"  store <16 x float> %y1_{m}, ptr %out_{m}, align 64",
        ]
    return "\n".join([*lines, "  ret void", "}"])


def _octet(octet: int, sums: Sequence[tuple[int, str]]) -> list[str]:
    """The codes of 8 channels and their products: first those in the low halves of bytes, then the others."""
    lines = [
        f"  %o_{octet} = add i64 %o, {octet}",
        f"  %w_at_{octet} = getelementptr <16 x i32>, ptr %w_block, i64 %o_{octet}",
        f"  %w_{octet} = load <16 x i32>, ptr %w_at_{octet}, align 64",
        f"  %ahead_{octet} = getelementptr i8, ptr %w_at_{octet}, i64 {_AHEAD}",
        f"  call void @llvm.prefetch.p0(ptr %ahead_{octet}, i32 0, i32 3, i32 1)",
        f"  %x_skip_{octet} = shl i64 %o_{octet}, 3",
        f"  %shifted_{octet} = lshr <16 x i32> %w_{octet}, splat (i32 4)",
        f"  %q0_{octet} = and <16 x i32> %w_{octet}, splat (i32 {0x0F0F0F0F})",
        f"  %q1_{octet} = and <16 x i32> %shifted_{octet}, splat (i32 {0x0F0F0F0F})",
    ]
    for side in (0, 1):
        before, after = 2 * octet + side, 2 * octet + side + 1
        lines.append(f"  %x_i_{before} = add i64 %x_skip_{octet}, {4 * side}")
        for m, digit in sums:
            name = f"{digit}_{m}_{before}"
            old = f"%{digit}{before}_{m}" if before else f"%{digit}_{m}"
            lines += [
                f"  %x_at_{name} = getelementptr i8, ptr %x_{digit}_{m}, i64 %x_i_{before}",
                f"  %x_{name} = call <16 x i32> @four_bytes(ptr %x_at_{name})",
                f"  %{digit}{after}_{m} = call <16 x i32> @dot(<16 x i32> {old}, "
                f"<16 x i32> %q{side}_{octet}, <16 x i32> %x_{name})",
            ]
    return lines
