"""The kernel of blocks that stay runs on the CPU: its barriers, indices, joins and sums.

Its instructions are replaced by what they do (``host_bulk.h``, ``host_wgmma.h``).
"""

from __future__ import annotations

import pytest
import torch

from awqc.kernels import marlin_many
from awqc.kernels.marlin_many import TILE_TOKENS, fitting
from tests.kernels.marlin_on_host import multiply_on_host
from tests.kernels.marlin_problem import problem
from tests.kernels.on_host import COMPILER
from tests.kernels.test_marlin_many import LIMIT

pytestmark = pytest.mark.skipif(COMPILER is None, reason="needs a C++ compiler")
CALL = (
    "many(x_map, y, packed, bias, partials, flags, tag, tokens, n, row_blocks, k_blocks, token_tiles, waves)"
)


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
    tiling = fitting(tokens, form, group, LIMIT)
    shares = tiling.shares(*of.packed.shape[:2], m, processors)
    found = multiply_on_host(
        "marlin_many.cu",
        CALL,
        marlin_many._macros(tiling, group, dtype, False),
        of,
        shares.blocks,
        together=form == "cluster",
        parts=shares.parts(tiling),
        waves=shares.waves,
    )
    of.near(found)
