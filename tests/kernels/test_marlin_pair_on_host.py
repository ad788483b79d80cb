"""The kernel for many tokens and few rows runs on the CPU: its ring, and how four sums meet in a cluster.

Its instructions are replaced by what they do (``host_bulk.h``, ``host_wgmma.h``); blocks are processes.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from awqc.kernels import marlin_pair
from awqc.kernels.aligned import aligned
from awqc.kernels.marlin_pair import PairTiling
from awqc.kernels.marlin_wide import TILE_TOKENS
from tests.kernels.marlin_problem import Problem, problem
from tests.kernels.on_host import COMPILER, Memory, compiled

pytestmark = pytest.mark.skipif(COMPILER is None, reason="needs a C++ compiler")
ENTRY = """
extern "C" int run_pair(unsigned blocks, const u16* x, int width, u16* y, const u8* packed, const u16* bias,
    int tokens, int n, int k_blocks) {
  const TensorMap map = {x, width, tokens, TOKENS};
  const int token_tiles = (tokens + TOKENS - 1) / TOKENS;
  make_clusters(blocks, 2 * CONSUMERS);
  return launch_together(blocks, CONSUMERS + 128, [=] {
    pair(map, y, packed, bias, tokens, n, k_blocks, token_tiles);
  });
}
"""


def multiply_on_host(tiling: PairTiling, of: Problem, group: int) -> Tensor:
    """As ``marlin_pair.multiply`` does."""
    macros = marlin_pair._macros(tiling, group, of.x.dtype, False)
    kernels = compiled("marlin_pair.cu", ENTRY, "unsigned char", **macros)
    x = aligned(of.x)
    tokens, n = x.shape[0], of.weight.shape[0]
    row_blocks, columns = of.packed.shape[:2]
    out = Memory(kernels, torch.full((tokens, n), torch.nan, dtype=x.dtype))
    kept = [Memory(kernels, tensor) for tensor in (x, of.packed, of.bias)]
    failed = kernels.run_pair(
        *(tiling.blocks(row_blocks, tokens), kept[0].pointer, x.shape[1]),
        *(out.pointer, kept[1].pointer, kept[2].pointer, tokens, n, columns),
    )
    assert not failed
    return out.read()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("tokens", TILE_TOKENS)
@pytest.mark.parametrize(
    ("n", "k", "m", "group"), [(72, 1000, 70, 64), (65, 300, 33, 128), (136, 1160, 20, 32)]
)
def test_products(n: int, k: int, m: int, group: int, tokens: int, dtype: torch.dtype) -> None:
    of = problem(n, k, m, group, dtype, bias=n % 8 > 0)
    of.near(multiply_on_host(PairTiling(tokens, 3), of, group))
