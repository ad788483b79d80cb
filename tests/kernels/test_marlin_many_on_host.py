"""The kernel of blocks that stay runs on the CPU: its barriers, indices, joins and sums.

Its instructions are replaced by what they do (``host_bulk.h``, ``host_wgmma.h``).
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from awqc.kernels import marlin_many
from awqc.kernels.aligned import aligned
from awqc.kernels.marlin_many import TILE_TOKENS, ManyTiling, fitting
from tests.kernels.marlin_problem import Problem, problem
from tests.kernels.on_host import COMPILER, Memory, compiled
from tests.kernels.test_marlin_many import LIMIT

pytestmark = pytest.mark.skipif(COMPILER is None, reason="needs a C++ compiler")
ENTRY = """
extern "C" int run_many(unsigned blocks, const u16* x, int width, u16* y, const u8* packed, const u16* bias,
    float4* partials, u64* flags, int tokens, int n, int row_blocks, int k_blocks, int waves) {
  const TensorMap map = {x, width, tokens, TOKENS};
  const int token_tiles = (tokens + TOKENS - 1) / TOKENS;
  const auto block = [=] {
    many(map, y, packed, bias, partials, flags, 77, tokens, n, row_blocks, k_blocks, token_tiles, waves);
  };
  make_clusters(blocks, 2 * CONSUMERS);
  if (CLUSTER) return launch_together(blocks, CONSUMERS + 128, block);
  launch({blocks, 1, 1}, CONSUMERS + 128, block);
  return 0;
}
"""


def multiply_on_host(tiling: ManyTiling, of: Problem, group: int, processors: int) -> Tensor:
    """As ``marlin_many.multiply`` does; flags are found to be cleared."""
    macros = marlin_many._macros(tiling, group, of.x.dtype, False)
    kernels = compiled("marlin_many.cu", ENTRY, "unsigned char", **macros)
    x = aligned(of.x)
    tokens, n = x.shape[0], of.weight.shape[0]
    row_blocks, columns = of.packed.shape[:2]
    shares = tiling.shares(row_blocks, columns, tokens, processors)
    parts = shares.parts(tiling)
    flags = Memory(kernels, torch.zeros(parts.flags, dtype=torch.int64))
    partials = Memory(kernels, torch.full((parts.sums // 4,), torch.nan))
    out = Memory(kernels, torch.full((tokens, n), torch.nan, dtype=x.dtype))
    kept = [Memory(kernels, tensor) for tensor in (x, of.packed, of.bias)]
    failed = kernels.run_many(
        *(shares.blocks, kept[0].pointer, x.shape[1], out.pointer, kept[1].pointer, kept[2].pointer),
        *(partials.pointer, flags.pointer, tokens, n, row_blocks, columns, shares.waves),
    )
    assert not failed
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
        (136, 650, 40, 64, 132, "cluster"),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_products(
    n: int, k: int, m: int, group: int, processors: int, form: str, tokens: int, dtype: torch.dtype
) -> None:
    of = problem(n, k, m, group, dtype, bias=n % 8 > 0)
    of.near(multiply_on_host(fitting(tokens, form, group, LIMIT), of, group, processors))
