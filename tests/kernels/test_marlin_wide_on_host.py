"""The kernel for many tokens runs on the CPU: its ring, and what blocks with the same rows tell each other.

Its instructions are replaced by what they do (``host_bulk.h``, ``host_wgmma.h``); blocks are processes.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from awqc.kernels import marlin_wide
from awqc.kernels.aligned import aligned
from awqc.kernels.marlin_wide import WideTiling
from tests.kernels.marlin_problem import Problem, problem
from tests.kernels.on_host import COMPILER, Memory, compiled

pytestmark = pytest.mark.skipif(COMPILER is None, reason="needs a C++ compiler")
ENTRY = """
extern "C" int run_wide(unsigned blocks, const u16* x, int width, u16* y, const u8* packed, const u16* bias,
    float4* partials, u64* flags, int tokens, int n, int row_blocks, int k_blocks) {
  const TensorMap map = {x, width, tokens, TOKENS};
  const int token_tiles = (tokens + TOKENS - 1) / TOKENS;
  return launch_together(blocks, CONSUMERS + 128, [=] {
    wide(map, y, packed, bias, partials, flags, 77, tokens, n, row_blocks, k_blocks, token_tiles);
  });
}
"""


def multiply_on_host(tiling: WideTiling, of: Problem, group: int) -> Tensor:
    """As ``marlin_wide.multiply`` does; flags are found to be cleared."""
    macros = marlin_wide._macros(tiling, group, of.x.dtype, False)
    kernels = compiled("marlin_wide.cu", ENTRY, "unsigned char", **macros)
    x = aligned(of.x)
    tokens, n = x.shape[0], of.weight.shape[0]
    row_blocks, columns = of.packed.shape[:2]
    parts = tiling.parts(row_blocks, tokens)
    flags = Memory(kernels, torch.zeros(parts.flags, dtype=torch.int64))
    partials = Memory(kernels, torch.full((parts.sums // 4,), torch.nan))
    out = Memory(kernels, torch.full((tokens, n), torch.nan, dtype=x.dtype))
    kept = [Memory(kernels, tensor) for tensor in (x, of.packed, of.bias)]
    failed = kernels.run_wide(
        *(tiling.blocks(row_blocks, tokens), kept[0].pointer, x.shape[1]),
        *(out.pointer, kept[1].pointer, kept[2].pointer, partials.pointer, flags.pointer),
        *(tokens, n, row_blocks, columns),
    )
    assert not failed
    assert not flags.read().any()
    return out.read()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("n", "k", "m", "group", "tokens", "split", "row_blocks"),
    [
        (136, 900, 40, 64, 64, 1, 2),
        (200, 520, 70, 32, 64, 4, 2),
        (130, 300, 33, 128, 32, 2, 2),
        (72, 1030, 20, 128, 32, 8, 2),  # more blocks than there are parts of a tile
        (264, 400, 20, 128, 32, 2, 4),
        (300, 520, 100, 64, 128, 4, 2),
        (65, 1030, 50, 32, 64, 8, 4),
    ],
)
def test_products(
    n: int, k: int, m: int, group: int, tokens: int, split: int, row_blocks: int, dtype: torch.dtype
) -> None:
    of = problem(n, k, m, group, dtype, bias=n % 8 > 0)
    of.near(multiply_on_host(WideTiling(tokens, split, 3, row_blocks), of, group))
