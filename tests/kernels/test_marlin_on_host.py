"""The streaming kernel's path for compute capability 8.x runs on the CPU: every tiling's indices and sums.

Its instructions are replaced by what they do (``host_ptx.h``); Hopper's copies and clusters are not here.
"""

from __future__ import annotations

import ctypes

import pytest
import torch
from torch import Tensor

from awqc.kernels import marlin_layout as layout
from awqc.kernels.marlin_stream import Tiling, aligned, tile_tokens
from awqc.kernels.qlinear import dequantize
from tests.kernels.on_host import COMPILER, Memory, compiled

pytestmark = pytest.mark.skipif(COMPILER is None, reason="needs a C++ compiler")
ENTRY = """
extern "C" void run_small(unsigned gx, unsigned gy, const u16* x, u16* y, const u8* packed, const u16* bias,
    float* partials, int tokens, int n, int strips, int k_blocks, int k) {
  launch({gx, gy, 1}, WARPS * 32,
         [=] { small(x, y, packed, bias, partials, tokens, n, strips, k_blocks, k); });
}
"""


def multiply_on_host(
    x: Tensor,
    packed: Tensor,
    bias: Tensor | None,
    n: int,
    group: int,
    bfloat16_scales: bool,
    tiling: Tiling,
    turned: int,
) -> Tensor:
    """As :func:`awqc.kernels.marlin_stream.multiply` does on a device without bulk copies."""
    kernels = compiled(
        "marlin_small.cu",
        ENTRY,
        "unsigned char",
        BF16=int(x.dtype == torch.bfloat16),
        SCALE_BF16=int(bfloat16_scales),
        GROUP=group,
        TOKENS=tile_tokens(x.shape[0]),
        WARPS=tiling.warps,
        STRIPS=tiling.strips,
        ROUNDS=tiling.rounds,
        SPLIT=tiling.split,
        DEPTH=tiling.depth,
        HOPPER=0,
        TURNED=turned,
    )
    assert tiling.shared_bytes(min(x.shape[0], 16), group) <= 1 << 18
    x = aligned(x)
    tokens, k = x.shape
    nan = torch.tensor(float("nan"), dtype=x.dtype)
    y, partials = (
        Memory(kernels, nan.expand(tokens, n)),
        Memory(kernels, nan.float().expand(tiling.split, tokens, n)),
    )
    operands = [Memory(kernels, tensor) for tensor in (x, packed, bias)]
    strips = packed.shape[0] * layout.STRIPS
    kernels.run_small(
        tiling.blocks(strips),
        -(-tokens // 16),
        operands[0].pointer,
        y.pointer,
        operands[1].pointer,
        operands[2].pointer,
        partials.pointer,
        *(ctypes.c_int(size) for size in (tokens, n, strips, packed.shape[1], k)),
    )
    if tiling.split == 1:
        return y.read()
    return (partials.read().sum(0) + (0 if bias is None else bias.float())).to(x.dtype)


@pytest.mark.parametrize(
    ("n", "k", "group_size", "tokens", "tiling", "turned"),
    [
        (64, 256, 128, 1, Tiling(4, 1, 1, 1, 2), 0),
        (200, 392, 32, 5, Tiling(4, 3, 2, 1, 1), 0),
        (130, 512, 64, 8, Tiling(2, 2, 3, 1, 2), 0),
        (70, 1000, -1, 9, Tiling(4, 2, 1, 2, 2), 0),
        (70, 1000, -1, 9, Tiling(4, 2, 1, 2, 2), 1),
        (200, 392, 32, 16, Tiling(4, 3, 1, 1, 2), 1),
        (64, 256, 64, 23, Tiling(2, 2, 1, 1, 1), 1),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_product_agrees_with_float64(
    n: int, k: int, group_size: int, tokens: int, tiling: Tiling, turned: int, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(n + k)
    group = layout.kernel_group(group_size, k)
    assert group is not None
    channels = k if group_size == -1 else group_size
    codes = torch.randint(0, 16, (n, k), generator=generator, dtype=torch.uint8)
    scales = (torch.rand(n, -(-k // channels), generator=generator) * 0.02 + 0.01).half()
    zeros = torch.randint(0, 16, scales.shape, generator=generator, dtype=torch.uint8)
    bias = torch.randn(n, generator=generator).to(dtype) if n % 20 == 0 else None
    x = (torch.randn(tokens, k, generator=generator) + 0.5).to(dtype)
    packed = layout.pack(codes, scales, zeros, group_size)
    got = multiply_on_host(x, packed, bias, n, group, False, tiling, turned)
    weight = dequantize(codes, scales, zeros, group_size, torch.float64)
    want = x.double() @ weight.t() + (0 if bias is None else bias.double())
    # Exact products of activations and 16 + code, summed in float32, and one rounding of the result.
    energy = x.double().norm(dim=1, keepdim=True) * 0.03 * 31
    rounding = 1.01 * torch.finfo(dtype).eps / 2 * want.abs()
    assert ((got.double() - want).abs() <= rounding + 6 * k**0.5 * 2.0**-24 * energy).all()
