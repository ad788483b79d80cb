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
from pathlib import Path

#: What the entry point finds in its array: addresses, sizes, and the functions that start threads.
ARGUMENTS = (
    "x",  # (rows, channels) activations
    "codes",  # (blocks, channels / 8, 16, 4) bytes
    "scales",  # (blocks, chunks, 16)
    "zeros",  # (blocks, chunks, 16) bytes
    "out",  # (rows, outputs), like x
    "bias",  # (outputs), or no address
    "digits",  # scratch: (rows, 2, channels) bytes, high ones first
    "sums",  # scratch: (rows, chunks) float32, of the rounded activations in steps
    "steps",  # scratch: (rows, chunks) float32
    "rows",
    "outputs",
    "blocks",
    "chunks",
    "octets",  # eights of channels in a chunk, an even number
    "threads",
    "parallel",  # GOMP_parallel
    "thread",  # omp_get_thread_num
    "team",  # omp_get_num_threads
)
_TEXT = Path(__file__).with_suffix(".ll")
#: What follows in that file is written out for each number of rows.
_CUT = "; ---- tile ----\n"
#: LLVM's names for the dtypes of activations and scales. bfloat16 is widened on its bits: with a type of its
#: own, LLVM before 22 calls a function for it that the process does not have.
TYPES = {"float32": "float", "float16": "half", "bfloat16": "i16"}
#: Rows of activations that share one reading of the codes, by instruction set: two sums are held for each.
TILE = {"avx512vnni": 4, "avxvnni": 2, "avx2": 2}
#: Bytes by which the reading of codes runs ahead, into the second-level cache, which has more reads under way
#: than the first: from memory, 2 KB ahead take 1.15-1.4 times as long, and none 1.6 times.
_AHEAD = 8192
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

#: From ``%given`` to float32.
_EXTEND = {
    "float32": "  %v = bitcast <16 x float> %given to <16 x float>",
    "float16": "  %v = fpext <16 x half> %given to <16 x float>",
    "bfloat16": """\
  %wide = zext <16 x i16> %given to <16 x i32>
  %high = shl <16 x i32> %wide, splat (i32 16)
  %v = bitcast <16 x i32> %high to <16 x float>""",
}
#: From float32 to the bits of the result's dtype. There is no instruction for bfloat16 on every set, so it is
#: rounded on the bits: to nearest, ties to even, and what is not a number stays that.
_ROUNDED = {
    "float32": """
define internal <16 x i32> @rounded(<16 x float> %v) alwaysinline {
  %bits = bitcast <16 x float> %v to <16 x i32>
  ret <16 x i32> %bits
}""",
    "float16": """
define internal <16 x i16> @rounded(<16 x float> %v) alwaysinline {
  %half = fptrunc <16 x float> %v to <16 x half>
  %bits = bitcast <16 x half> %half to <16 x i16>
  ret <16 x i16> %bits
}""",
    "bfloat16": """
define internal <16 x i16> @rounded(<16 x float> %v) alwaysinline {
  %bits = bitcast <16 x float> %v to <16 x i32>
  %kept = lshr <16 x i32> %bits, splat (i32 16)
  %odd = and <16 x i32> %kept, splat (i32 1)
  %half = add <16 x i32> %odd, splat (i32 32767)
  %sum = add <16 x i32> %bits, %half
  %near = lshr <16 x i32> %sum, splat (i32 16)
  %quiet = or <16 x i32> %kept, splat (i32 64)
  %no_number = fcmp uno <16 x float> %v, %v
  %all = select <16 x i1> %no_number, <16 x i32> %quiet, <16 x i32> %near
  %out = trunc <16 x i32> %all to <16 x i16>
  ret <16 x i16> %out
}""",
}


def source(isa: str, x_type: str, scale_type: str, bias_type: str) -> str:
    """The module whose ``linear`` runs the whole product.

    Args:
        isa: a key of ``TILE``.
        x_type, scale_type, bias_type: keys of ``TYPES``.
    """
    tile = TILE[isa]
    code = [_DOT[isa]]
    if isa != "avx512vnni":
        code.append(_HALVES)
    fixed, tile_text = _TEXT.read_text().split(_CUT)
    code += [fixed, _ROUNDED[x_type], *(_tile(tile_text, rows) for rows in range(1, tile + 1))]
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
        "DECLARE_MASKED": _MASKED,
        "LOW": _indices(range(8)),
        "HIGH": _indices(range(8, 16)),
        "BOTH": _indices(range(16)),
        "MAGIC_BITS": str(0x4B400000),
        "MAGIC": "12582912.0",
        "TINY": "0x39B0000000000000",
        "TOP": f"{_TOP}.0",
        "TILE": str(tile),
        "AHEAD": str(_AHEAD),
    }.items():
        text = text.replace(name, value)
    for letter, dtype in (("X", x_type), ("S", scale_type), ("B", bias_type)):
        size = 4 if dtype == "float32" else 2
        text = text.replace(f"  %v = EXTEND_{letter}", _EXTEND[dtype]).replace(f"{letter}_TYPE", TYPES[dtype])
        text = text.replace(f"{letter}_BYTES", str(size)).replace(f"{letter}_BITS", f"i{8 * size}")
    return text


_MASKED = "\n".join(
    f"declare <16 x i{bits}> @llvm.masked.load.v16i{bits}.p0(ptr, i32, <16 x i1>, <16 x i{bits}>)\n"
    f"declare void @llvm.masked.store.v16i{bits}.p0(<16 x i{bits}>, ptr, i32, <16 x i1>)"
    for bits in (16, 32)
)


def _indices(values: Sequence[int]) -> str:
    return "<" + ", ".join(f"i32 {value}" for value in values) + ">"


def _arguments() -> str:
    """Loads of everything in the array ``%a``; LLVM drops those that are not used."""
    lines = []
    for index, name in enumerate(ARGUMENTS):
        kind = "i64" if name in _SIZES else "ptr"
        lines.append(f"  %p_{name} = getelementptr i64, ptr %a, i64 {index}")
        lines.append(f"  %{name} = load {kind}, ptr %p_{name}, align 8")
    return "\n".join(lines)


_SIZES = ("rows", "outputs", "blocks", "chunks", "octets", "threads")


def _tile(text: str, rows: int) -> str:
    """``text`` for ``rows`` rows of activations: what ``_M`` stands in is there once for each."""
    lines = []
    for line in text.replace("ROWS", str(rows)).splitlines():
        each = "_M" in line
        lines += (
            [line.replace("_M", f"_{m}").replace(" NUMBER", f" {m}") for m in range(rows)] if each else [line]
        )
    return "\n".join(lines)
