"""The kernel for many tokens runs on the CPU: its ring, and what blocks with the same rows tell each other.

Its instructions are replaced by what they do (``host_bulk.h``, ``host_wgmma.h``); blocks are processes.
"""

from __future__ import annotations

import pytest
import torch

from awqc.kernels import marlin_wide
from awqc.kernels.marlin_wide import WideTiling
from tests.kernels.marlin_on_host import multiply_on_host
from tests.kernels.marlin_problem import problem
from tests.kernels.on_host import COMPILER

pytestmark = pytest.mark.skipif(COMPILER is None, reason="needs a C++ compiler")
CALL = "wide(x_map, y, packed, bias, partials, flags, tag, tokens, n, row_blocks, k_blocks, token_tiles)"


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
    tiling = WideTiling(tokens, split, 3, row_blocks)
    macros = marlin_wide._macros(tiling, group, dtype, False)
    blocks, parts = tiling.blocks(of.packed.shape[0], m), tiling.parts(of.packed.shape[0], m)
    of.near(multiply_on_host("marlin_wide.cu", CALL, macros, of, blocks, together=True, parts=parts))
