"""The kernel for many tokens and few rows runs on the CPU: its ring, and how four sums meet in a cluster.

Its instructions are replaced by what they do (``host_bulk.h``, ``host_wgmma.h``); blocks are processes.
"""

from __future__ import annotations

import pytest
import torch

from awqc.kernels import marlin_pair
from awqc.kernels.marlin_pair import PairTiling
from awqc.kernels.marlin_wide import TILE_TOKENS
from tests.kernels.marlin_on_host import multiply_on_host
from tests.kernels.marlin_problem import problem
from tests.kernels.on_host import COMPILER

pytestmark = pytest.mark.skipif(COMPILER is None, reason="needs a C++ compiler")
CALL = "pair(x_map, y, packed, bias, tokens, n, k_blocks, token_tiles)"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("tokens", TILE_TOKENS)
@pytest.mark.parametrize(
    ("n", "k", "m", "group"), [(72, 1000, 70, 64), (65, 300, 33, 128), (136, 1160, 20, 32)]
)
def test_products(n: int, k: int, m: int, group: int, tokens: int, dtype: torch.dtype) -> None:
    of = problem(n, k, m, group, dtype, bias=n % 8 > 0)
    tiling = PairTiling(tokens, 3)
    macros = marlin_pair._macros(tiling, group, dtype, False)
    blocks = tiling.blocks(of.packed.shape[0], m)
    of.near(multiply_on_host("marlin_pair.cu", CALL, macros, of, blocks, together=True))
