"""The kernel of blocks that stay runs on the CPU: its barriers, indices, joins and sums.

Its instructions are replaced by what they do (``host_bulk.h``, ``host_wgmma.h``); clusters are not here.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from awqc.kernels import marlin_layout as layout
from awqc.kernels import marlin_many
from awqc.kernels.aligned import aligned
from awqc.kernels.marlin_many import TILE_TOKENS, ManyTiling, fitting
from awqc.kernels.qlinear import dequantize
from tests.kernels.on_host import COMPILER, Memory, compiled
from tests.kernels.test_marlin_many import LIMIT, assert_near

pytestmark = pytest.mark.skipif(COMPILER is None, reason="needs a C++ compiler")
ENTRY = """
extern "C" void run_many(unsigned blocks, const u16* x, int width, u16* y, const u8* packed, const u16* bias,
    float4* partials, u64* flags, int tokens, int n, int row_blocks, int k_blocks, int waves) {
  const TensorMap map = {x, width, tokens, TOKENS};
  const int token_tiles = (tokens + TOKENS - 1) / TOKENS;
  launch({blocks, 1, 1}, CONSUMERS + 128, [=] {
    many(map, y, packed, bias, partials, flags, 77, tokens, n, row_blocks, k_blocks, token_tiles, waves);
  });
}
"""


def multiply_on_host(
    tiling: ManyTiling, x: Tensor, packed: Tensor, bias: Tensor | None, n: int, group: int, processors: int
) -> Tensor:
    """As ``marlin_many.multiply`` does; flags are found to be cleared."""
    kernels = compiled(
        "marlin_many.cu", ENTRY, "unsigned char", **marlin_many._macros(tiling, group, x.dtype, False)
    )
    x = aligned(x)
    tokens = x.shape[0]
    row_blocks, columns = packed.shape[:2]
    shares = tiling.shares(row_blocks, columns, tokens, processors)
    parts = shares.parts(tiling)
    flags = Memory(kernels, torch.zeros(parts.flags, dtype=torch.int64))
    partials = Memory(kernels, torch.full((parts.sums // 4,), torch.nan))
    out = Memory(kernels, torch.full((tokens, n), torch.nan, dtype=x.dtype))
    kept = [Memory(kernels, tensor) for tensor in (x, packed, bias)]
    kernels.run_many(
        *(shares.blocks, kept[0].pointer, x.shape[1], out.pointer, kept[1].pointer, kept[2].pointer),
        *(partials.pointer, flags.pointer, tokens, n, row_blocks, columns, shares.waves),
    )
    assert not flags.read().any()
    return out.read()


@pytest.mark.parametrize("tokens", TILE_TOKENS)
@pytest.mark.parametrize(
    ("n", "k", "m", "group", "processors", "form"),
    [
        (130, 392, 150, 64, 3, "whole"),
        (600, 140, 129, 32, 2, "shared"),
        (72, 500, 30, 128, 3, "shared"),
        (300, 384, 260, 128, 3, "whole"),
        (513, 520, 40, 128, 2, "shared"),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_products(
    n: int, k: int, m: int, group: int, processors: int, form: str, tokens: int, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(n + k)

    def uniform(*size: int) -> Tensor:
        return torch.rand(size, generator=generator)

    tiling = fitting(tokens, form, group, LIMIT)
    codes = (uniform(n, k) * 16).byte()
    scales = uniform(n, -(-k // group)) * 0.02 + 0.01
    scales = (scales * 2.0 ** (uniform(*scales.shape) * 12 - 6).round()).half()
    scales[uniform(*scales.shape) < 0.1] = 0
    zeros = (uniform(*scales.shape) * 17).byte()
    packed = layout.pack(codes, scales, zeros, group)
    x = torch.randn(m, k, generator=generator).to(dtype)
    bias = torch.randn(n, generator=generator).to(dtype) if n % 8 else None
    found = multiply_on_host(tiling, x, packed, bias, n, group, processors)
    weight = dequantize(codes, scales, zeros, group, torch.float64)
    assert_near(found, x, weight, torch.zeros(n, dtype=dtype) if bias is None else bias)
