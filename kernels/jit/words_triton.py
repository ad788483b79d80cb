"""Codes out of the words of :mod:`awqc.kernels.planes`, as floats, zero points subtracted."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def differences(words, zeros, dtype: tl.constexpr, ptx: tl.constexpr):
    """``code - zero`` of the four planes, exact in ``dtype``.

    Args:
        words: int16 tile.
        zeros: uint8, of a shape that broadcasts to the tile.
        dtype: a floating dtype.
        ptx: use NVIDIA's packed instructions (compute capability 8.0 and later) for float16 and bfloat16.

    The packed form puts the code of each half of a register under the exponent of 1024 (float16) or 128
    (bfloat16), whose last place is 1, and subtracts: 1.1 and 1.4 instructions a code. The generic form
    converts integers, which the hardware does at an eighth of the rate.
    """
    if ptx and dtype == tl.float16:
        low = (zeros.to(tl.int16) | 0x6400).to(tl.float16, bitcast=True)
        low, _ = tl.broadcast(low, words)
        # A code in bits 4 to 7 reads 1024 + 16 q: divided by 16, 64 + q.
        high, _ = tl.broadcast((-64.0 - zeros.to(tl.float32)).to(tl.float16), words)
        return tl.inline_asm_elementwise(
            """{
            .reg .b32 upper, sixteenth;
            mov.b32 sixteenth, 0x2c002c00;
            shr.u32 upper, $4, 8;
            lop3.b32 $0, $4, 0x000f000f, 0x64006400, 0xea;
            lop3.b32 $1, $4, 0x00f000f0, 0x64006400, 0xea;
            lop3.b32 $2, upper, 0x000f000f, 0x64006400, 0xea;
            lop3.b32 $3, upper, 0x00f000f0, 0x64006400, 0xea;
            sub.f16x2 $0, $0, $5;
            fma.rn.f16x2 $1, $1, sixteenth, $6;
            sub.f16x2 $2, $2, $5;
            fma.rn.f16x2 $3, $3, sixteenth, $6;
            }""",
            "=&r,=&r,=&r,=&r,r,r,r",
            [words, low, high],
            dtype=(tl.float16, tl.float16, tl.float16, tl.float16),
            is_pure=True,
            pack=2,
        )
    elif ptx and dtype == tl.bfloat16:
        offset = (zeros.to(tl.int16) | 0x4300).to(tl.bfloat16, bitcast=True)
        offset, _ = tl.broadcast(-offset, words)
        return tl.inline_asm_elementwise(
            """{
            .reg .b32 a, b, c, one;
            mov.b32 one, 0x3f803f80;
            shr.u32 a, $4, 4;
            shr.u32 b, $4, 8;
            shr.u32 c, $4, 12;
            lop3.b32 $0, $4, 0x000f000f, 0x43004300, 0xea;
            lop3.b32 $1, a, 0x000f000f, 0x43004300, 0xea;
            lop3.b32 $2, b, 0x000f000f, 0x43004300, 0xea;
            lop3.b32 $3, c, 0x000f000f, 0x43004300, 0xea;
            fma.rn.bf16x2 $0, $0, one, $5;
            fma.rn.bf16x2 $1, $1, one, $5;
            fma.rn.bf16x2 $2, $2, one, $5;
            fma.rn.bf16x2 $3, $3, one, $5;
            }""",
            "=&r,=&r,=&r,=&r,r,r",
            [words, offset],
            dtype=(tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16),
            is_pure=True,
            pack=2,
        )
    else:
        zeros = zeros.to(tl.int16)
        return (
            ((words & 15) - zeros).to(tl.float32).to(dtype),
            (((words >> 4) & 15) - zeros).to(tl.float32).to(dtype),
            (((words >> 8) & 15) - zeros).to(tl.float32).to(dtype),
            (((words >> 12) & 15) - zeros).to(tl.float32).to(dtype),
        )
